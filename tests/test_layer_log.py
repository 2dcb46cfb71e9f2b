"""What a run with log.layers writes: layers.jsonl, TensorBoard, Weights & Biases, heat maps. A run without is as it was."""

import json
import logging
import math
import shutil
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from programs import program
from short_runs import events, metrics, settings
from test_sharding import bits

from mutransformer.config.load import load
from mutransformer.config.run import LogConfig
from mutransformer.config.schema import Config
from mutransformer.errors import FINISHED
from mutransformer.training import heat_maps, layer_log
from mutransformer.training import loop as training
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.heat_maps import History, heat_map
from mutransformer.training.layer_log import LayerLog
from mutransformer.training.layer_sizes import QUANTITIES, Layout
from mutransformer.training.loop import train
from mutransformer.training.metrics import Metrics, NonFiniteLoss
from mutransformer.training.program import build_with_data
from mutransformer.training.run_folder import RunFolder
from mutransformer.training.sinks import board_tag, layer_tags, read_layers

LAYOUT = Layout(2, {"residual": True, "final": False}, {"w_q": True, "embed": False}, {"w_q": "hidden", "embed": "input"})
N = 3 + 3 * 5


def numbers(step: int) -> np.ndarray:
    return np.arange(1, N + 1, dtype=np.float32) * np.float32(2**step)


def settings_of(tmp_path: Path, **log: Any) -> tuple[Config, RunFolder]:
    config = Config(name="r", workdir=str(tmp_path), steps=20, log=LogConfig(**{"layers": 1, "every": 1, **log}))
    return config, RunFolder(config.rundir)


def log_steps(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last + 1):
        metrics.record(step, {"loss": 1.0})
        metrics.layers(step, jnp.asarray(numbers(step)), LAYOUT)


# A whole run


LENGTH = ["steps=6", "checkpoint.every=4", "eval.every=3", "mesh.x=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the sizes of layers at every other step."""
    folder = tmp_path_factory.mktemp("layers")
    assert train(*build_with_data(load(settings(folder, *LENGTH, "log.layers=2", "name=on")))) == FINISHED
    return folder / "runs" / "on"


def board(run: Path) -> dict[str, list[int]]:
    """The steps of each of TensorBoard's tags of layers."""
    found = dict[str, list[int]]()
    for tag, step, _ in events(run):
        if tag.startswith("per_layer"):
            found.setdefault(tag, []).append(step)
    return found


def test_a_run_writes_the_sizes_of_its_layers(run: Path) -> None:
    rows, scalars = read_layers(run), metrics(run)
    assert [row["step"] for row in rows] == [2, 4, 6] and list(scalars) == [1, 2, 3, 4, 5, 6]
    assert not any("layer" in tag for line in scalars.values() for tag in line), "metrics.jsonl is as it was"
    assert set(rows[0]) == {"step", "time", *QUANTITIES}
    assert all(len(values) == 2 for values in (rows[0]["activation"]["query"], rows[0]["update"]["w_down"]))
    for row in rows:
        config = load([str(run / "config.yaml")]).model
        shapes = {"w_q": 64 * 64, "w_k": 64 * 64, "w_v": 64 * 64, "w_o": 64 * 64, "w_up": 4 * 64**2, "w_down": 4 * 64**2}
        shapes |= dict.fromkeys(("embed", "unembed"), 64 * (config.n_vocab or 0))
        squares = sum(shapes[name] * np.sum(np.square(size)) for name, size in row["gradient"].items())
        assert math.sqrt(squares) == pytest.approx(scalars[row["step"]]["norm/gradient"], rel=1e-4)
    assert board(run).keys() == layer_tags({quantity: rows[0][quantity] for quantity in QUANTITIES}).keys()
    assert all(steps == [2, 4, 6] for steps in board(run).values())
    assert {path.name for path in run.glob("*.png")} == {f"per_layer_{quantity}.png" for quantity in QUANTITIES}


def test_a_run_without_measures_nothing_and_trains_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LayerSizes", lambda *_: pytest.fail("measured"))
    args = settings(run.parent.parent, *LENGTH, "name=off")
    assert train(*build_with_data(load(args))) == FINISHED
    off, on = metrics(run.parent / "off"), metrics(run)
    for step, line in off.items():
        assert {k: v for k, v in line.items() if not k.startswith(("speed", "memory", "time"))}.items() <= on[step].items()
    written = {path.name for path in (run.parent / "off").iterdir()}
    assert not any("layer" in name for name in written)
    assert saved_state(run) == saved_state(run.parent / "off"), "bit for bit"


def saved_state(run: Path) -> list[bytes]:
    config = load([str(run / "config.yaml")])
    with closing(Checkpoints(config, RunFolder(config.rundir), read_only=True)) as checkpoints:
        return bits(checkpoints.restore(6, program(config).state)[0])


@pytest.mark.slow
def test_a_whole_run_that_is_resumed_has_each_row_once(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "on"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    before = read_layers(copy)
    text = (copy / "layers.jsonl").read_text()
    (copy / "layers.jsonl").write_text(text.replace('"step": 6, ', '"step": 6, "stale": [0.0], ') + '{"step": 8, "ti')
    args = settings(run.parent.parent, *LENGTH, "log.layers=3", "name=on")  # of which 6 is a multiple too, and 4 is not
    assert train(*build_with_data(load([*args, f"workdir={tmp_path / 'runs'}"]))) == FINISHED
    after = read_layers(copy)
    same = [{key: value for key, value in row.items() if key != "time"} for row in before]
    assert [{key: value for key, value in row.items() if key != "time"} for row in after] == same
    assert after[2]["time"] > before[2]["time"] and after[1] == before[1]
    assert all(steps == [2, 4, 6] for steps in board(copy).values())


# The sinks


def test_sizes_are_read_one_step_late_and_stand_beside_the_metrics(tmp_path: Path) -> None:
    config, folder = settings_of(tmp_path, tensorboard=False)
    with Metrics(config, folder, 1.0, 1, 0) as log:
        log_steps(log, 1, 3)
        assert [row["step"] for row in read_layers(folder.path)] == [1, 2]
    rows = read_layers(folder.path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["activation"] == {"residual": [2.0, 4.0], "final": 6.0} and rows[1]["gradient"]["embed"] == 24.0


def test_the_sizes_of_a_step_that_ends_the_run_are_written_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config, folder = settings_of(tmp_path, tensorboard=False)
    with pytest.raises(NonFiniteLoss), Metrics(config, folder, 1.0, 1, 0) as log:
        log_steps(log, 1, 2)
        log.record(3, {"loss": math.nan})
        log.layers(3, jnp.asarray(numbers(3)), LAYOUT)
        log.flush()
    assert [row["step"] for row in read_layers(folder.path)] == [1, 2, 3]
    assert len(list(folder.path.glob("per_layer_*.png"))) == len(QUANTITIES)


def test_resuming_drops_the_rows_beyond(tmp_path: Path) -> None:
    config, folder = settings_of(tmp_path)
    with Metrics(config, folder, 1.0, 1, 0) as log:
        log_steps(log, 1, 5)
    path = folder.path / "layers.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "ti')
    without, _ = settings_of(tmp_path, layers=0)
    for resumed, start, kept in ((config, 4, [1, 2, 3, 4, 5]), (config, 3, [1, 2, 3]), (without, 2, [1, 2])):
        with Metrics(resumed, folder, 1.0, 1, start) as log:
            assert [row["step"] for row in read_layers(folder.path)] == kept[:start]
            if start == 4:
                log_steps(log, 5, 5)
        assert [row["step"] for row in read_layers(folder.path)] == kept
        assert all(steps == kept for steps in board(folder.path).values()) and board(folder.path)


def test_numbers_that_are_not_finite_are_text(tmp_path: Path) -> None:
    config, folder = settings_of(tmp_path)
    bad = numbers(1)
    bad[1:4] = math.nan, math.inf, -math.inf
    for start in (0, 1):  # at the second start TensorBoard's events are written from the rows
        with Metrics(config, folder, 1.0, 1, start) as log:
            if start == 0:
                log.record(1, {"loss": 1.0})
                log.layers(1, jnp.asarray(bad), LAYOUT)
    row = json.loads((folder.path / "layers.jsonl").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert row["activation"] == {"residual": [2.0, "nan"], "final": "inf"}
    shown = {tag: value for tag, _, value in events(folder.path)}
    assert math.isnan(shown["per_layer_activation/residual/1"]) and shown["per_layer_activation/final"] == math.inf


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    config, folder = settings_of(tmp_path)
    with Metrics(config, folder, 1.0, 1, 0) as log:
        log_steps(log, 1, 2)
        log.heat_maps()
    assert not list(tmp_path.iterdir())


def test_tags_come_after_the_losses_and_sort_by_layer() -> None:
    tags = layer_tags({"update": {"w_q": [1.0] * 11, "embed": 2.0}})
    assert list(tags)[:2] == ["per_layer_update/w_q/00", "per_layer_update/w_q/01"] and tags["per_layer_update/embed"] == 2.0
    assert all(tag > board_tag(loss) for tag in tags for loss in ("train/loss", "validation/loss"))


def test_wandb_gets_tags_and_images_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    logged: list[tuple[int, dict[str, Any]]] = []
    run = SimpleNamespace(
        log=lambda values: logged.append((values["step"], {k: v for k, v in values.items() if k != "step"})),
        define_metric=lambda *_, **__: None,
        summary={},
        finish=lambda exit_code: None,
    )
    wandb = SimpleNamespace(init=lambda **_: run, Image=lambda image: image.size, Table=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config, folder = settings_of(tmp_path, wandb="proj", tensorboard=False)
    with Metrics(config, folder, 1.0, 1, 0) as log:
        log_steps(log, 1, 2)
        with log.pause():
            log.heat_maps()
        log.scalars(2, {"validation/loss": 1.0})
    steps = [step for step, _ in logged]
    assert steps == sorted(steps), "a row of an earlier step would be dropped"
    assert (1, layer_tags(LAYOUT.split(numbers(1)))) in logged
    images = {tag: size for _, values in logged for tag, size in values.items() if tag.startswith("per_layer/")}
    assert set(images) == {f"per_layer/{quantity}" for quantity in QUANTITIES} and all(w > 600 for w, _ in images.values())


# Heat maps


def history(n: int) -> History:
    found = History()
    for step in range(1, n + 1):
        found.add(step, LAYOUT.split(np.arange(1, N + 1, dtype=np.float32)) | {"step": step})
    return found


def test_a_history_keeps_equally_spaced_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat_maps, "COLUMNS", 8)
    assert history(8).steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert history(9).steps == [1, 3, 5, 7, 9] and history(40).steps == [1, 9, 17, 25, 33]
    assert history(3).values("activation", "residual").tolist() == [[1] * 3, [2] * 3]
    assert history(3).values("gradient", "embed").shape == (1, 3)


def test_a_heat_map_shows_factors_of_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the median is an octave above it, whatever the median is; of what is expected, twice 1 is."""
    matplotlib = pytest.importorskip("matplotlib")
    seen = dict[str, Any]()
    real = matplotlib.axes.Axes.imshow

    def imshow(self: Any, values: Any, **look: Any) -> Any:
        seen.setdefault("drawn", []).append(values)
        return real(self, values, **look)

    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", imshow)
    found = History()
    for step, factor in enumerate((1.0, 0.0, 1.0, 4.0, math.nan, 1.0)):
        found.add(step, {"weight": {"w_q": [3 * factor, 3.0], "embed": 5.0}, "update_to_expected": {"w_q": [2.0, 0.5]}})
    png = heat_map(found, "weight", LAYOUT)
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    inside, outside = seen.pop("drawn")
    assert inside[0].tolist() == [0, None, 0, 2, None, 0] and inside[1].tolist() == [0] * 6 and outside.tolist() == [[0] * 6]
    heat_map(found, "update_to_expected", LAYOUT)
    assert seen["drawn"][0][:, 0].tolist() == [1, -1] and seen["drawn"][1].mask.all()


def test_drawing_takes_little_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    now, drawn = [0.0], list[float]()

    def slow(*_: Any) -> bytes:
        now[0] += 3 / len(QUANTITIES)
        drawn.append(now[0])
        return b"png"

    monkeypatch.setattr(layer_log, "heat_map", slow)
    monkeypatch.setattr(layer_log.time, "monotonic", lambda: now[0])
    log = LayerLog(tmp_path, 0, True, lambda action: None)
    for step in range(1, 1301):
        now[0] += 1
        log.take(step, jnp.ones(N), LAYOUT)
        log.read()
        log.draw(step)
    first, second = drawn[:: len(QUANTITIES)]
    assert first > layer_log.SECONDS / layer_log.DRAWING and second - first > 3 / layer_log.DRAWING
    for _ in range(2):
        log.draw(1300, last=True)
    assert len(drawn) == 3 * len(QUANTITIES), "once more at the end, and not again without new numbers"


def two_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> tuple[RunFolder, list[str]]:
    """The folder of a run of two steps, and its warnings."""
    config, folder = settings_of(tmp_path)
    with caplog.at_level(logging.WARNING, "mutransformer"), Metrics(config, folder, 1.0, 1, 0) as log:
        log_steps(log, 1, 2)
        log.close({"validation/loss": 1.0})
    return folder, [record.getMessage() for record in caplog.records]


def test_without_matplotlib_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder, lines = two_steps(tmp_path, caplog)
    assert lines == ["log.layers: without heat maps, which need a package: pip install 'mutransformer[plots]'"]
    assert len(read_layers(folder.path)) == 2 and not list(folder.path.glob("*.png"))


def test_a_heat_map_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(layer_log, "heat_map", lambda *_: 1 / 0)
    folder, lines = two_steps(tmp_path, caplog)
    assert lines == ["heat maps of the layers cannot be drawn: division by zero; training goes on without"]
