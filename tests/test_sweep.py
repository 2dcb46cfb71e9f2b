"""The sweep as a user runs it: what it trains and writes, how it resumes after a stop, and which mistakes it refuses."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from short_runs import ROOT, finish, refuse_before_jax, settings, start

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.config.schema import Config, may_change_on_resume, non_defaults
from mutransformer.data.cache.prepare import prepare
from mutransformer.errors import FINISHED, STOPPED, USAGE_ERROR, ConfigError
from mutransformer.sharding import devices as hardware
from mutransformer.study.sweep import grid, records
from mutransformer.study.sweep.parallel_runs import ParallelRuns, RunGroup, ShardedRun, mean_losses
from mutransformer.study.sweep.run import _groups, _latest_snapshot, _snapshots
from mutransformer.training.loop import train
from mutransformer.training.program import build_with_data
from mutransformer.training.run_folder import LOCK, RunFolder

SCRIPT = "scripts/sweep.py"
STEPS = 80
TINY = [
    "model.d_model=64",
    "model.d_base=32",
    "model.d_head=8",
    "model.n_layer=1",
    "model.vocab_multiple=64",
    "data.seq_len=16",
    "precision.compute=float32",
    "eval.batches=2",
    "log.every=10",
]
GRID = ["--widths", "32,64", "--lrs", "2^-8:2^-6:2", "--seeds", "0,1"]
POINTS = [(2.0**-8, 0), (2.0**-8, 1), (2.0**-6, 0), (2.0**-6, 1)]


def arguments(folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    return settings(folder, *TINY, f"steps={steps}", *more)


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch):
    """The command within this process, on its eight devices; gives the exit code."""
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: None)  # a setting of the complete process

    def run(*args: str) -> int:
        return main(["sweep", *args])

    return run


def n_runs(group: RunGroup) -> int:
    return len(group.hyper.lr) if isinstance(group, ParallelRuns) else 1


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Filled with (class, width, runs) of whatever is trained from now on."""
    found = []
    for kind in (ParallelRuns, ShardedRun):

        def init(one: Any, kind: type = kind, own: Callable[[Any], Any] = kind.init) -> Any:
            found.append((kind.__name__, one.config.model.d_model, n_runs(one)))
            return own(one)

        monkeypatch.setattr(kind, "init", init)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def complete(folder: Path) -> Path:
    """An uninterrupted sweep: four runs each of two widths, on two devices."""
    out = folder / "complete"
    finish(start(SCRIPT, [*arguments(folder), *GRID, "--out", str(out)], devices=2, quick=True))
    return out


def lines(out: Path) -> list[str]:
    return (out / records.FILE).read_text(encoding="utf-8").splitlines()


def outcome(run: records.Run) -> tuple:
    return run.key, run.status, run.steps, run.diverged_at, run.logged, run.train_loss, run.validation_loss


def close(ours: records.Run, theirs: records.Run) -> bool:
    """Whether losses are those of the other program: to 1e-5 in the first half, and later to what training makes of that."""
    assert ours.key == theirs.key and ours.logged == theirs.logged
    a, b = (np.array([*run.train_loss, run.validation_loss], float) for run in (ours, theirs))
    apart = np.abs(a - b)
    return bool(np.max(apart[:5]) <= 1e-5 and np.max(apart) <= 2e-4)


# Results


def test_each_run_is_recorded(complete: Path, folder: Path) -> None:
    runs = records.read(complete)
    assert [run.key for run in runs] == [("mup", width, lr, seed) for width in (32, 64) for lr, seed in POINTS]
    for run in runs:
        assert (run.status, run.steps, run.diverged_at) == ("finished", STEPS, None)
        assert run.logged == list(range(10, STEPS + 1, 10)) and len(run.train_loss) == 8
        losses = np.array([*run.train_loss, run.validation_loss], float)
        assert np.isfinite(losses).all() and losses[-2] < losses[0]
        assert run.settings == non_defaults(load(arguments(folder, f"model.d_model={run.width}")))
    assert len({run.validation_loss for run in runs}) == len(runs)
    assert not list((complete / "snapshots").glob("*")), "snapshots are deleted when their runs have ended"


def test_a_run_of_a_sweep_equals_one_of_train(complete: Path, folder: Path) -> None:
    (ours,) = (run for run in records.read(complete) if run.key == ("mup", 32, 2**-6, 1))
    more = ("model.d_model=32", "optim.lr=0.015625", "seed=1", "log.every=1", "name=alone", f"eval.every={STEPS}")
    config = load(arguments(folder, *more))
    assert train(*build_with_data(config)) == FINISHED
    logged = [json.loads(line) for line in (config.rundir / "metrics.jsonl").read_text().splitlines()]
    means = np.mean(np.reshape([line["train/loss"] for line in logged], (-1, 10)), axis=1)
    theirs = dataclasses.replace(ours, train_loss=means.tolist(), validation_loss=logged[-1]["validation/loss"])
    assert close(ours, theirs)
    another = dataclasses.replace(records.read(complete)[2], seed=1)  # the control: a run of another seed
    assert another.lr == ours.lr and not close(ours, another)


def test_tensorboard_has_the_curve_and_settings_of_each_run(complete: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    runs = records.read(complete)
    names = {f"{r.variant} width={r.width} lr=2^{math.log2(r.lr):g} seed={r.seed}": r for r in runs}
    assert {path.name for path in (complete / "tensorboard").iterdir()} == set(names)
    for name, run in names.items():
        board = EventAccumulator(str(complete / "tensorboard" / name)).Reload()
        curve = {e.step: e.value for e in board.Scalars("loss/train")}
        assert curve == pytest.approx(dict(zip(run.logged, run.train_loss, strict=True)), abs=1e-5)
        assert [(e.step, e.value) for e in board.Scalars("loss/validation")] == [
            (STEPS, pytest.approx(run.validation_loss, abs=1e-5))
        ]
        content = board.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
        hparams = metadata.parse_session_start_info_plugin_data(content).hparams
        assert hparams["optim.lr"].number_value == run.lr and hparams["seed"].number_value == run.seed
        assert hparams["model.d_model"].number_value == run.width and hparams["variant"].string_value == "mup"
        assert set(hparams) >= {"variant", "optim.lr", "seed", "model.d_head"} and "optim.beta1" not in hparams
        assert metadata.EXPERIMENT_TAG not in board.summary_metadata, "TensorBoard itself chooses the columns"


# Resuming


def test_the_same_command_again_trains_nothing(complete: Path, folder: Path, sweep, trained) -> None:
    before = lines(complete)
    assert sweep(*arguments(folder), *GRID, "--out", str(complete)) == FINISHED
    assert lines(complete) == before and trained == []


@pytest.mark.slow
def test_a_stopped_sweep_resumes_to_bit_equal_losses(complete: Path, folder: Path) -> None:
    out = folder / "stopped"
    command = [*arguments(folder), *GRID, "--out", str(out)]
    process = start(SCRIPT, command, devices=2, quick=True)
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    assert process.stdout is not None
    output = ""
    while "width 64: step" not in output:  # within the second group, the first has ended
        line = process.stdout.readline()
        assert line, f"ended before it was stopped: {process.communicate()}"
        output += line
    process.send_signal(signal.SIGTERM)
    assert "stopped; progress is saved" in finish(process, expect=STOPPED)
    watchdog.cancel()
    assert [run.width for run in records.read(out)] == [32] * 4
    (saved,) = (out / "snapshots").glob("*/*")
    assert 0 < int(saved.name) < STEPS
    output = finish(start(SCRIPT, command, devices=2, quick=True))
    assert "4 runs to train, 4 already in " in output and f"resuming after step {saved.name}" in output
    assert list(map(outcome, records.read(out))) == list(map(outcome, records.read(complete)))
    assert not list((out / "snapshots").glob("*"))


@pytest.mark.slow
def test_one_sweep_at_a_time_has_a_folder(complete: Path, folder: Path, sweep, trained, capsys) -> None:
    with RunFolder(complete).owned():
        assert sweep(*arguments(folder), *GRID, "--out", str(complete)) == USAGE_ERROR
    message = f"error: {complete}: in use by process {os.getpid()} on host .*; choose another --out, or stop that run"
    assert re.fullmatch(message, capsys.readouterr().err.splitlines()[-1]) and not trained
    assert sweep(*arguments(folder), *GRID, "--out", str(complete)) == FINISHED and not (complete / LOCK).exists()


def test_a_folder_that_is_removed_meanwhile_is_told(folder: Path, sweep, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = folder / "removed"

    def score(*args: Any) -> Any:
        shutil.rmtree(out)
        return mean_losses(*args)

    monkeypatch.setattr("mutransformer.study.sweep.run.mean_losses", score)
    options = ["--widths", "32", "--lrs", "2^-6", "--out", str(out)]
    assert sweep(*arguments(folder, "log.tensorboard=false", steps=20), *options) == USAGE_ERROR
    assert f"error: {out}: the folder was removed or replaced while" in capsys.readouterr().err and not out.exists()


def test_only_the_run_of_a_truncated_line_is_trained_again(complete: Path, folder: Path, sweep, trained, capsys) -> None:
    out = folder / "cut"
    out.mkdir()
    text = (complete / records.FILE).read_bytes()
    (out / records.FILE).write_bytes(text[:-20])
    assert sweep(*arguments(folder), *GRID, "--out", str(out)) == FINISHED
    assert trained == [("ParallelRuns", 64, 8)]  # one run, on each of the eight devices
    assert "removed a truncated last line" in capsys.readouterr().out
    assert lines(out)[:7] == lines(complete)[:7] and len(lines(out)) == 8
    assert close(records.read(out)[-1], records.read(complete)[-1])


@pytest.mark.parametrize("change", [["steps=81"], ["optim.beta2=0.9"], ["data.batch_size=4", "optim.clip_norm=0"]])
def test_a_folder_with_other_settings_is_refused(change, complete: Path, folder: Path, sweep, trained, capsys) -> None:
    before = lines(complete)
    assert sweep(*arguments(folder), *change, *GRID, "--out", str(complete)) == USAGE_ERROR
    err = capsys.readouterr().err
    keys = ", ".join(sorted(text.partition("=")[0] for text in change))
    assert re.fullmatch(r"error: .*\n", err) and f"had other settings: {keys}; choose another --out or --label" in err
    assert lines(complete) == before and trained == []


def test_settings_that_change_no_loss_may_differ_in_a_folder(complete: Path, folder: Path, sweep, trained) -> None:
    changed = ["data.prefetch=1", "log.tensorboard=false", "checkpoint.keep=1", "watchdog.timeout=100", "compile_cache=null"]
    before = lines(complete)
    assert sweep(*arguments(folder), *changed, *GRID, "--out", str(complete)) == FINISHED
    assert lines(complete) == before and trained == []


def test_what_changes_no_loss_is_a_setting_and_a_model_or_optimizer_has_none() -> None:
    assert records.WITHOUT_EFFECT <= records.DEFAULTS.keys()
    assert not [key for key in records.WITHOUT_EFFECT if not may_change_on_resume(key)]
    assert not [key for key in records.WITHOUT_EFFECT if key.startswith(("model.", "optim.", "precision."))]


@pytest.mark.parametrize("fault", ["none", "another version", "a truncated file"])
def test_a_snapshot_that_cannot_be_read_starts_its_runs_again(fault: str, tmp_path: Path, caplog) -> None:
    with closing(_snapshots(tmp_path, ["identity"])) as snapshots:
        saved = {"w": jnp.arange(4.0), "n": jnp.int32(3)}
        snapshots.save(3, args=ocp.args.StandardSave(saved))
        snapshots.wait_until_finished()
        if fault == "a truncated file":
            for file in (Path(snapshots.directory) / "3").rglob("*"):
                if file.is_file():
                    os.truncate(file, file.stat().st_size // 2)
        shapes = {"w": saved["w"], "other" if fault == "another version" else "n": saved["n"]}
        with caplog.at_level("WARNING", "mutransformer"):
            step, restored = _latest_snapshot(snapshots, jax.eval_shape(lambda: shapes))
        if fault == "none":
            assert step == 3 and restored["w"].tolist() == [0, 1, 2, 3]
        else:
            assert (step, restored) == (0, None) and "its runs start again" in caplog.text
            assert snapshots.latest_step() is None, "it can be saved again"


# Groups of runs


@pytest.mark.slow
def test_runs_that_do_not_fit_are_trained_sharded(
    complete: Path, folder: Path, sweep, trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "sharded"
    command = [*arguments(folder), "--widths", "64", "--lrs", "2^-6", "--seeds", "1", "--out", str(out)]
    step, before = ParallelRuns.step, signal.getsignal(signal.SIGTERM)

    def interrupted(runs: ParallelRuns, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(runs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ParallelRuns, "step", interrupted)
        assert sweep(*command) == STOPPED
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (out / "snapshots").glob("*/*")] == ["1"]
    assert sweep(*command, "--memory", "1e-6") == FINISHED
    assert trained == [("ParallelRuns", 64, 8), ("ShardedRun", 64, 1)]
    (ours,) = records.read(out)
    assert close(ours, records.read(complete)[-1])


def test_groups_are_halved_until_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups only; what is trained in them is tested elsewhere."""
    config = load(arguments(folder, "model.d_model=32"))
    corpus, points = prepare(config.data), [(2.0**-i, 0) for i in range(20)]  # on eight devices: three runs on each, or one
    monkeypatch.setattr(ParallelRuns, "compile", lambda runs: len(runs.hyper.lr) // 8)

    def sizes(memory: int) -> list[tuple[type, int, int]]:
        found = list(_groups(config.with_vocab(corpus.tokenizer.n_vocab), corpus, points, memory))
        assert [point for _, together in found for point in together] == points
        for group, together in found:
            if isinstance(group, ParallelRuns):
                lrs = np.asarray(group.hyper.lr).tolist()
                assert lrs[: len(together)] == [lr for lr, _ in together] and set(lrs[len(together) :]) <= {together[-1][0]}
            else:
                assert (group.config.optim.lr, group.config.seed) == together[0]
        return [(type(group), n_runs(group), len(together)) for group, together in found]

    assert sizes(3) == [(ParallelRuns, 24, 20)]
    assert sizes(2) == [(ParallelRuns, 8, 8), (ParallelRuns, 8, 8), (ParallelRuns, 8, 4)]
    assert sizes(0) == [(ShardedRun, 1, 1)] * 20


@pytest.mark.slow
def test_diverged_runs_and_swept_settings_are_recorded(folder: Path, sweep) -> None:
    out = folder / "diverged"
    options = ["--widths", "32", "--lrs", "2^-6,1e30", "--set", "model.qk_scale=0.5", "--label", "hot", "--out", str(out)]
    assert sweep(*arguments(folder, "optim.clip_norm=0", steps=20), *options) == FINISHED
    calm, wild = records.read(out)
    assert (calm.variant, wild.variant) == ("hot model.qk_scale=0.5",) * 2 and (calm.lr, wild.lr) == (2**-6, 1e30)
    assert calm.settings["model.qk_scale"] == wild.settings["model.qk_scale"] == 0.5
    assert calm.status == "finished" and calm.diverged_at is None and calm.validation_loss and all(calm.train_loss)
    assert wild.status == "diverged" and wild.loss == math.inf
    assert wild.diverged_at is not None and 1 < wild.diverged_at <= 10 and wild.train_loss == [None, None]


@pytest.mark.slow
def test_sweeps_over_steps_and_batch_sizes(folder: Path, sweep, trained, capsys) -> None:
    common = [*arguments(folder, "model.d_model=32"), "--lrs", "2^-6", "--out", str(folder / "axes")]
    assert sweep(*common, "--steps", "20,40") == FINISHED
    assert sweep(*common, "--steps", "40,50") == FINISHED  # one of them is there
    assert sweep(*common, "--batches", "2,4", "--label", "rows", "steps=20") == FINISHED
    runs = records.read(folder / "axes")
    assert [(run.variant, run.steps, records.AXES["batch"].size(run)) for run in runs] == [
        *(("mup", steps, 8) for steps in (20, 40, 50)),
        *(("rows", 20, rows) for rows in (2, 4)),
    ]
    assert [records.AXES["tokens"].size(run) for run in runs] == [20 * 128, 40 * 128, 50 * 128, 20 * 32, 20 * 64]
    assert len({run.validation_loss for run in runs}) == 5 and len(trained) == 5
    names = {path.name for path in (folder / "axes/tensorboard").iterdir()}
    assert {"mup steps=20 lr=2^-6 seed=0", "rows batch=2 lr=2^-6 seed=0"} <= names
    assert sweep(*common, "--steps", "20,40", "optim.beta2=0.9") == USAGE_ERROR
    assert "its runs of mup at steps 20 had other settings: optim.beta2" in capsys.readouterr().err


# The grid


def test_rates() -> None:
    assert grid.rates("--lrs", "2^-10:2^-2:1") == [2.0**i for i in range(-10, -1)]
    assert grid.rates("--lrs", "2^-3:2^-2:0.5") == pytest.approx([2**-3, 2**-2.5, 2**-2], rel=1e-12)
    assert grid.rates("--lrs", "0.01:0.05:1") == pytest.approx([0.01, 0.02, 0.04])  # the last is a bound
    assert grid.rates("--lrs", "2^-4:2^-4:1") == [2**-4]
    assert grid.rates("--lrs", "0.03,2^-6,1e-3") == [1e-3, 2**-6, 0.03]
    # A third of an octave ninety times is thirty octaves, whatever is rounded on the way.
    assert len(grid.rates("--lrs", f"2^-30:1:{1 / 3}")) == 91


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "",
        "2^-2:2^-4:1",
        "2^-4:2^-2:0",
        "2^-4:2^-2:-1",
        "2^-4:2^-2:inf",
        "0:1:1",
        "2^-4:2^-2",
        "2^-4:2^-2:1:1",
        "0.1,0.1",
        "0.5,2^-1",
        "-0.1",
        "0",
        "nan",
        "inf",
        "2^9999",
        "0^-1",
        "-2^0.5",
        "2^-4,2^-3:2^-2:1",
        "0.1,",
    ],
)
def test_invalid_rates(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--lrs {re.escape(text)}: ") as error:
        grid.rates("--lrs", text)
    assert "\n" not in str(error.value)


def test_one_rate_is_written_as_in_a_list() -> None:
    for text in ("2^-6", "2^-6.5", "0.015625", "1e-3"):
        assert grid.one_rate("--lr", text) == grid.rates("--lrs", f"{text},2^-20")[-1]
    for text in ("0", "-1", "x", "", "2^-6,2^-5", "2^-6:2^-5:1"):
        with pytest.raises(ConfigError, match=f"^--lr {re.escape(text)}: "):
            grid.one_rate("--lr", text)


def test_integers() -> None:
    assert grid.integers("--widths", "256,64,128") == [64, 128, 256]
    for text in ("", "x", "64,", "64,64", "6.4", "1e2", "64:128"):
        with pytest.raises(ConfigError, match=f"^--widths {re.escape(text)}: "):
            grid.integers("--widths", text)
    assert grid.seeds("--seeds", f"{2**31 - 1},0") == [0, 2**31 - 1]
    for text in ("-1,0", f"0,{2**31}"):
        with pytest.raises(ConfigError, match=f"^--seeds {text}: must lie in 0 ... "):
            grid.seeds("--seeds", text)


def test_a_config_for_each_combination_and_width() -> None:
    base = ["model.d_head=32", "optim.rule=mup"]
    found = grid.configs(base, "width", [64, 128], ["model.qk_scale=0.1,0.2", "optim.rule=mup,sp"])
    assert [(c.name, c.width, c.config.model.qk_scale, c.config.optim.rule) for c in found] == [
        (f"{rule} model.qk_scale={scale}", width, scale, rule)
        for scale in (0.1, 0.2)
        for rule in ("mup", "sp")
        for width in (64, 128)
    ]
    assert [c.name for c in grid.configs(base, "width", [64], [])] == ["mup"]
    assert [c.name for c in grid.configs(base, "width", [64], [], "mine")] == ["mine"]
    assert [c.name for c in grid.configs(base, "width", [64], ["steps=1,2"], "mine")] == ["mine steps=1", "mine steps=2"]
    listed = grid.configs([*base, "data.source=text"], "width", [64], ["data.files=[a,b],[c]"])
    assert [c.config.data.files for c in listed] == [["a", "b"], ["c"]]


def test_configs_over_every_axis() -> None:
    width = grid.configs(["optim.rule=sp"], "width", [64, 128])
    assert [(c.name, c.width) for c in width] == [("sp", 64), ("sp", 128)]
    depth = grid.configs(["model.n_layer=3"], "depth", [2, 4], label="deep")
    assert [(c.name, c.config.model.n_layer, c.where) for c in depth] == [("deep", 2, "depth 2"), ("deep", 4, "depth 4")]
    tokens, batch = grid.configs([], "tokens", [100, 200]), grid.configs([], "batch", [4, 8])
    assert [(c.config.steps, c.size, c.where) for c in tokens] == [(100, 100, "steps 100"), (200, 200, "steps 200")]
    assert [(c.config.data.batch_size, c.size, c.where) for c in batch] == [(4, 4, "batch 4"), (8, 8, "batch 8")]


@pytest.mark.parametrize(
    ("axis", "rule", "base"),
    [
        ("depth", "completep", "model.n_layer_base=2"),
        ("tokens", "completed_p", "optim.tokens_base=1000"),
        ("batch", "completed_p", "optim.batch_base=1000"),
    ],
)
def test_a_rule_that_follows_the_axis_must_know_its_base(axis: grid.SweepAxis, rule: str, base: str) -> None:
    with pytest.raises(ConfigError, match=f"^{base.partition('=')[0]} = null: the rule {rule} then does nothing over --"):
        grid.check_bases(grid.configs([f"optim.rule={rule}"], axis, [2, 4]))
    grid.check_bases(grid.configs([f"optim.rule={rule}", base], axis, [2, 4]))
    grid.check_bases(grid.configs(["optim.rule=mup"], axis, [2, 4]))
    if axis != "depth":  # a rule of the run's own
        own = f"optim.{axis}_exponent=0.3"
        with pytest.raises(ConfigError, match=f"= null: optim.{axis}_exponent then does nothing over --"):
            grid.check_bases(grid.configs([own], axis, [2, 4]))
        grid.check_bases(grid.configs([own, base], axis, [2, 4]))


def test_non_default_settings() -> None:
    assert non_defaults(Config()) == {}
    assert non_defaults(load(["optim.lr=0.5", "steps=1000", "model.n_vocab=300", "data.threads=1"])) == {
        "optim.lr": 0.5,
        "model.n_vocab": 300,
        "data.threads": 1,
    }


# Mistakes


MISTAKES = {
    "width that heads do not divide": (
        ["--widths", "32,36"],
        "model.d_model = 36: not divisible by model.d_head = 8; .*32 and 40",
    ),
    "width twice": (["--widths", "32,32"], "--widths 32,32: a value is repeated"),
    "width of nothing": (["--widths", "0,32"], "model.d_model = 0: must be at least 1"),
    "empty grid": (["--lrs", "2^-2:2^-4:1"], r"--lrs 2\^-2:2\^-4:1: an empty grid: the first rate is above the last"),
    "no rate": (["--lrs", "x"], "--lrs x: must be "),
    "negative seed": (["--seeds=-1"], r"--seeds -1: must lie in 0 \.\.\. 2\^31 - 1"),
    "seed of 32 bits": (["--seeds", "4294967295"], r"--seeds 4294967295: must lie in 0 \.\.\. 2\^31 - 1"),
    "unknown key": (["--set", "model.d_modle=32"], "model.d_modle=32: Key 'd_modle' not in 'ModelConfig'|d_modle"),
    "value of the wrong kind": (["--set", "model.qk_scale=a,b"], "model.qk_scale"),
    "no values": (["--set", "model.qk_scale"], "--set model.qk_scale: must be key=value,value,..."),
    "rate by --set": (["--set", "optim.lr=0.1,0.2"], "--set optim.lr=0.1,0.2: use --lrs"),
    "seed by --set": (["--set", "seed=1,2"], "--set seed=1,2: use --seeds"),
    "width by --set": (["--set", "model.d_model=32,64"], "--set model.d_model=32,64: use --widths"),
    "value twice": (["--set", "steps=2,2"], "--set: two combinations have the name mup steps=2"),
    "rules under one label": (
        ["--set", "optim.rule=mup,sp", "--label", "mine"],
        "--set: two combinations have the name mine; sweep optim.rule without --label",
    ),
    "memory": (["--memory", "nan"], "--memory nan: must be positive"),
    "no devices": (["--cpu-devices", "0"], "--cpu-devices 0: must be at least 1"),
    "missing file": (["missing.yaml"], "missing.yaml: cannot read it: No such file or directory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_reported_before_jax_starts(name: str, tmp_path: Path, sweep, monkeypatch, capsys) -> None:
    args, message = MISTAKES[name]
    given = ["--widths", "32", "--lrs", "0.1", *TINY]
    out = ["--out", str(tmp_path / "out")]
    refuse_before_jax(lambda: sweep(*given, *args, *out), message, tmp_path, monkeypatch, capsys)
    if name == "width twice":  # the control: a good command does start it
        with pytest.raises(AssertionError, match="JAX was started"):
            sweep(*given)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "10,20", "--set", "steps=1,2"], "--set steps=1,2: use --steps"),
        (["--batches", "4,8", "--set", "data.batch_size=1,2"], "--set data.batch_size=1,2: use --batches"),
        (["--depths", "0,2"], "model.n_layer = 0: must be at least 1"),
        (
            ["--depths", "2,4", "optim.rule=completep"],
            "model.n_layer_base = null: the rule completep then does nothing",
        ),
    ],
)
def test_mistakes_of_other_axes(args: list[str], message: str, tmp_path: Path, sweep, monkeypatch, capsys) -> None:
    given = ["--lrs", "0.1", *TINY, *args, "--out", str(tmp_path / "out")]
    refuse_before_jax(lambda: sweep(*given), message, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("of", ["all", "the last"])
def test_a_sweep_without_a_validation_split_is_refused_before_training(of: str, tmp_path: Path, sweep, trained, capsys) -> None:
    (file := tmp_path / "d.jsonl").write_text("".join(f'{{"text": "{i} and {i * i} and so on"}}\n' for i in range(50)))
    few = ["data.source=jsonl", f"data.files=[{file}]", "data.validation_fraction=1e-9"]
    options = ["--widths", "32,64", "--lrs", "2^-6", "--out", str(tmp_path / "out")]
    if of == "the last":
        options += ["--set", "data.validation_fraction=0.2,1e-9"]
    assert sweep(*arguments(tmp_path, *few), *options) == USAGE_ERROR
    assert "the validation split has no tokens; raise data.validation_fraction" in capsys.readouterr().err and trained == []


def test_a_sweep_within_the_warm_up_is_told(tmp_path: Path, sweep, monkeypatch, capsys) -> None:
    """Its optimum would be that of another schedule."""
    monkeypatch.setattr("mutransformer.study.sweep.run.prepare_data", lambda *_: (_ for _ in ()).throw(ConfigError("no further")))
    options = ["--widths", "32,64", "--lrs", "2^-6", "--out", str(tmp_path / "out")]
    assert sweep(*arguments(tmp_path, "optim.warmup_steps=400", steps=80), *options) == USAGE_ERROR
    out, err = capsys.readouterr()
    assert (out + err).count("ends within its warm-up of 400, at 0.2 x optim.lr") == 1


@pytest.mark.parametrize("sizes", [[], ["--widths", "32", "--steps", "10"]])
def test_one_axis_must_be_chosen(sizes: list[str], sweep, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        sweep(*sizes, "--lrs", "0.1")
    assert exit.value.code == USAGE_ERROR and "--widths" in capsys.readouterr().err


def test_a_folder_that_cannot_be_created_is_reported_first(folder: Path, sweep, trained, capsys) -> None:
    options = ["--widths", "32", "--lrs", "0.1", "--out", "/dev/null/out"]
    assert sweep(*arguments(folder, "log.tensorboard=false"), *options) == USAGE_ERROR
    assert capsys.readouterr().err == "error: /dev/null/out: cannot be used: Not a directory\n" and trained == []


def test_a_mistake_as_a_process_needs_no_jax(tmp_path: Path) -> None:
    without = (
        "import runpy, sys; sys.modules['jax'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    given = [sys.executable, "-c", without, ROOT / SCRIPT, "--widths", "100", "--lrs", "0.1"]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == USAGE_ERROR and not done.stdout
    assert re.fullmatch(r"error: model.d_model = 100: not divisible by model.d_head = 64; .*\n", done.stderr)
