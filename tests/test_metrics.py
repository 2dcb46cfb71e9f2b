"""What a run writes down: when scalars are read, what each sink holds, what a person sees."""

import io
import json
import logging
import math
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from rich.text import Text

from mutransformer.config.data import DataConfig
from mutransformer.config.run import LogConfig
from mutransformer.config.schema import Config
from mutransformer.errors import ConfigError
from mutransformer.training import metrics as module
from mutransformer.training import sinks
from mutransformer.training.metrics import Metrics, NonFiniteLoss, setup_logging
from mutransformer.training.run_folder import RunFolder

FLOPS = 1e6  # a token


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the metrics measure."""
    monkeypatch.setattr(module.time, "perf_counter", clock := Clock())
    return clock


class Scalar:
    """Notes when it is fetched from the device."""

    def __init__(self, value, name, fetched):
        self.value, self.name, self.fetched = value, name, fetched

    def __float__(self):
        self.fetched.append(self.name)
        return self.value


def config(tmp_path, **log):
    return Config(name="r", workdir=str(tmp_path), steps=20, data=DataConfig(seq_len=50, batch_size=2), log=LogConfig(**log))


def run_of(tmp_path, **log):
    settings = config(tmp_path, **log)
    return settings, RunFolder(settings.rundir)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]


def events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(tmp_path / "r")).Reload()


def train(metrics, first, last, clock=None, value=lambda step: float(step), seconds=0.5):
    for step in range(first, last + 1):
        if clock:
            clock.now += seconds
        metrics.record(step, {"loss": jnp.float32(value(step))})


def test_scalars_are_read_one_step_late_and_only_if_due(tmp_path):
    fetched = []
    with Metrics(*run_of(tmp_path, every=4, tensorboard=False), FLOPS, 1, 0) as metrics:
        seen = []
        for step in range(1, 11):
            metrics.record(step, {"loss": Scalar(1.0, step, fetched)})
            seen.append(list(fetched))
    assert seen == [[1], [1], [1], [1], [1, 4], [1, 4], [1, 4], [1, 4], [1, 4, 8], [1, 4, 8]]
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 8]


@pytest.mark.parametrize(("ready", "seconds"), [(True, 0.5), (False, 0.51)])
def test_a_step_ends_when_its_scalars_are_there(tmp_path, ready, seconds, clock):
    class OnDevice(Scalar):
        def is_ready(self):
            return ready

    with Metrics(*run_of(tmp_path, every=10, tensorboard=False), FLOPS, 1, 0) as metrics:
        for step in range(1, 12):
            clock.now += 0.09 if step == 11 else 0.5  # in the 11th call, or while it waits for the 10th
            metrics.record(step, {"loss": OnDevice(1.0, step, [])})
    assert lines(tmp_path)[-1]["speed/step_seconds"] == pytest.approx(seconds)


def test_flush_writes_what_is_due_once(tmp_path):
    with Metrics(*run_of(tmp_path, every=4, tensorboard=False), FLOPS, 1, 0) as metrics:
        train(metrics, 1, 4)
        assert [line["step"] for line in lines(tmp_path)] == [1]
        metrics.flush()
        metrics.flush()
        assert [line["step"] for line in lines(tmp_path)] == [1, 4]
        train(metrics, 5, 20)
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 8, 12, 16, 20]


def test_every_number_under_its_tag_in_both_files(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(module, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(module, "memory_in_use", lambda devices: {"bytes_in_use": 3, "peak_bytes": 4})
    names = ("loss", "learning_rate", "gradient_norm", "parameter_norm", "update_norm", "z_loss")
    with Metrics(*run_of(tmp_path), FLOPS, 2, 0) as metrics:
        for step in range(1, 11):
            clock.now += 60 if step == 1 else 0.5
            metrics.record(step, {name: jnp.float32(2 + i) for i, name in enumerate(names)})
        with metrics.pause():
            clock.now += 1000
        metrics.scalars(10, {"validation/loss": 2.5, "validation/bits_per_byte": 1.5})
        train(metrics, 11, 20, clock, lambda step: 3.0, 0.25)
        metrics.close({"validation/loss": 2.25})
    first, middle, last = lines(tmp_path)
    time = middle.pop("time")
    assert abs(time - last["time"]) < 60 and time > 1.7e9
    assert middle == {
        "step": 10,
        "train/loss": 2.0,
        "train/perplexity": math.exp(2),
        "optim/learning_rate": 3.0,
        "norm/gradient": 4.0,
        "norm/parameter": 5.0,
        "norm/update": 6.0,
        "train/z_loss": 7.0,
        "speed/step_seconds": 0.5,
        "speed/tokens_per_second": 200.0,
        "speed/model_flops_per_second": 200e6,
        "speed/mfu": pytest.approx(0.1),
        "memory/bytes_in_use": 3.0,
        "memory/peak_bytes": 4.0,
        "validation/loss": 2.5,
        "validation/bits_per_byte": 1.5,
    }
    assert first["step"] == 1 and not any(key.startswith("speed") for key in first)
    assert last["speed/step_seconds"] == 0.25 and last["validation/loss"] == 2.25

    board = events(tmp_path)
    shown = {{"train/loss": "loss/train", "validation/loss": "loss/validation"}.get(tag, tag): middle[tag] for tag in middle}
    assert set(board.Tags()["scalars"]) == set(shown) - {"step"}
    for tag in set(shown) - {"step"}:
        assert [(e.step, e.value) for e in board.Scalars(tag) if e.step == 10] == [(10, pytest.approx(shown[tag], rel=1e-6))]


def test_settings_and_results_stand_in_the_same_run(tmp_path):
    with Metrics(*run_of(tmp_path), FLOPS, 1, 0) as metrics:
        train(metrics, 1, 20)
        metrics.close({"validation/loss": 2.25})
    from tensorboard.plugins.hparams import metadata

    board = events(tmp_path)
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("```yaml\nname: r\n") and text.endswith("```")
    assert [path for path in (tmp_path / "r").iterdir() if path.is_dir()] == []
    tags = board.summary_metadata
    start = metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    assert set(start.hparams) == {"name", "workdir", "steps", "data.seq_len", "data.batch_size"}, "what is not the default"
    assert start.hparams["steps"].number_value == 20
    assert [(e.step, e.value) for e in board.Scalars("loss/validation")] == [(20, 2.25)]


def test_resuming_drops_what_lay_beyond(tmp_path):
    with Metrics(*run_of(tmp_path, every=2), FLOPS, 1, 0) as metrics:
        train(metrics, 1, 9)
        metrics.scalars(8, {"validation/loss": 8.5})
    path = tmp_path / "r" / "metrics.jsonl"
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4, 6, 8]
    path.write_text(path.read_text() + '{"step": 10, "ti')
    with Metrics(*run_of(tmp_path, every=2), FLOPS, 1, 5) as metrics:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]
        metrics.scalars(5, {"validation/loss": 5.5})
        train(metrics, 6, 9, value=lambda step: step + 0.25)
    assert [(line["step"], line.get("train/loss")) for line in lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (4, 4.0),
        (5, None),
        (6, 6.25),
        (8, 8.25),
    ]
    assert "validation/loss" not in lines(tmp_path)[-1]
    assert list(path.parent.glob("*.new")) == []
    board = events(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("loss/train")] == [(1, 1.0), (2, 2.0), (4, 4.0), (6, 6.25), (8, 8.25)]
    assert [e.step for e in board.Scalars("loss/validation")] == [5]


def test_a_step_that_is_written_again_keeps_one_line(tmp_path):
    for value in (1.0, 2.0):  # the second process resumes a run that is complete
        with Metrics(*run_of(tmp_path), FLOPS, 1, 20) as metrics:
            metrics.scalars(20, {"validation/loss": value})
    assert [(line["step"], line["validation/loss"]) for line in lines(tmp_path)] == [(20, 2.0)]


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_loss_that_is_not_finite_is_written_and_raised(tmp_path, value, text):
    with pytest.raises(NonFiniteLoss, match=f"^step 10: the loss is {text}$"):
        with Metrics(*run_of(tmp_path, tensorboard=False), FLOPS, 1, 0) as metrics:
            train(metrics, 1, 20, value=lambda step: value if step >= 9 else 1.0)
    assert lines(tmp_path)[-1]["train/loss"] == text
    assert "NaN" not in (tmp_path / "r" / "metrics.jsonl").read_text()


def test_no_checkpoint_is_made_after_a_loss_that_is_not_finite(tmp_path):
    with Metrics(*run_of(tmp_path, tensorboard=False), FLOPS, 1, 0) as metrics:
        train(metrics, 1, 7, value=lambda step: math.nan if step == 7 else 1.0)
        with pytest.raises(NonFiniteLoss, match="step 7"), metrics.pause():
            pytest.fail("the checkpoint would be written here")
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_huge_loss_has_an_infinite_perplexity(tmp_path):
    with Metrics(*run_of(tmp_path, tensorboard=False), FLOPS, 1, 0) as metrics:
        train(metrics, 1, 1, value=lambda step: 1e4)
    assert lines(tmp_path)[0]["train/perplexity"] == "inf"


def test_other_processes_write_nothing_but_see_the_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    fetched = []
    with pytest.raises(NonFiniteLoss, match="step 10"):
        with Metrics(*run_of(tmp_path), FLOPS, 1, 0) as metrics:
            metrics.note("hello")
            metrics.scalars(0, {"validation/loss": 1.0})
            for step in range(1, 20):
                loss = Scalar(1.0 if step < 10 else math.nan, f"loss {step}", fetched)
                metrics.record(step, {"loss": loss, "gradient_norm": Scalar(1.0, "norm", fetched)})
    assert fetched == ["loss 1", "loss 10"]
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys, clock):
    console = Console(file=sys.stdout, force_terminal=False, width=40)
    monkeypatch.setattr(module.rich, "get_console", lambda: console)
    with Metrics(*run_of(tmp_path, tensorboard=False), FLOPS, 1, 0) as metrics:
        metrics.note("[mesh] 1 x 1 :smile: " + "-" * 40)
        for step in range(1, 12):
            clock.now += 0.001
            metrics.record(step, {"loss": 7.8123, "learning_rate": 2**-6, "gradient_norm": 1.234})
        metrics.scalars(11, {"validation/loss": 5.0, "validation/bits_per_byte": 2.0})
    assert capsys.readouterr().out.splitlines() == [
        "[mesh] 1 x 1 :smile: " + "-" * 40,
        "step  1/20  loss  7.8123  lr 1.56e-02  grad  1.234",
        "step 10/20  loss  7.8123  lr 1.56e-02  grad  1.234  100.0k tok/s  eta 0m00s",
        "step 11/20  validation loss 5  bits per byte 2",
    ]


@pytest.mark.parametrize("colour", [True, False])
def test_bar_on_a_terminal_of_80_columns(tmp_path, monkeypatch, colour, clock):
    monkeypatch.setenv("TERM", "xterm")
    if colour:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system="standard")
    monkeypatch.setattr(module.rich, "get_console", lambda: console)
    with Metrics(*run_of(tmp_path, tensorboard=False), FLOPS, 1, 0) as metrics:
        metrics.scalars(0, {"validation/loss": 8.5})
        train(metrics, 1, 7, clock, seconds=0.125)
        assert metrics._bar.tasks[0].completed == 6, "it moves at every step, not at every logged one"
        train(metrics, 8, 20, clock, seconds=0.125)
    shown = screen.getvalue()
    assert ("\x1b[3" in shown) == colour
    text = Text.from_ansi(shown.replace("\r", "\n")).plain
    assert "step  0/20  validation loss 8.5\n" in text
    last = [line for line in text.split("\n") if "20/20" in line][-1]
    assert re.fullmatch(r"100% ━+ 20/20 loss 20.0000  0.8k tok/s  0m00s left 0m0\ds elapsed", last.strip())
    assert len(last) <= 77


def test_log_messages_are_plain_lines(capsys):
    logger = logging.getLogger("mutransformer")
    before = logger.level, logger.propagate, list(logger.handlers)
    try:
        setup_logging()
        setup_logging()
        logging.getLogger("mutransformer.data").info("12 files [train]")
        logging.getLogger("mutransformer.data").debug("unseen")
        logging.getLogger("mutransformer").warning("slow")
    finally:
        logger.level, logger.propagate, logger.handlers = before
    assert capsys.readouterr().out == "12 files [train]\nwarning: slow\n"


def test_wandb_is_asked_for_by_name_when_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^log.wandb = proj: .* pip install 'mutransformer\[wandb\]'$"):
        Metrics(*run_of(tmp_path, wandb="proj"), FLOPS, 1, 0)
    assert not list((tmp_path / "r").iterdir())


def test_wandb_gets_the_same_numbers_and_keeps_its_run(tmp_path, monkeypatch):
    logged, opened, ended, summary, axes = [], [], [], {}, []

    def init(**settings):
        opened.append(settings)
        return SimpleNamespace(
            log=lambda values: logged.append((values["step"], {k: v for k, v in values.items() if k != "step"})),
            define_metric=lambda name, step_metric: axes.append((name, step_metric)),
            summary=summary,
            finish=lambda exit_code: ended.append(exit_code),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=None, Table=None))
    for start in (0, 10, 0):
        with Metrics(*run_of(tmp_path, wandb="proj", tensorboard=False), FLOPS, 1, start) as metrics:
            metrics.scalars(start, {"validation/loss": 2.0})
            if start:
                metrics.close({"validation/loss": 2.0})
    assert logged == [(0, {"validation/loss": 2.0}), (10, {"validation/loss": 2.0}), (0, {"validation/loss": 2.0})]
    assert opened[0]["project"] == "proj" and opened[0]["name"] == "r" and opened[0]["config"]["optim"]["lr"] == 2**-6
    assert opened[0]["id"] == opened[1]["id"] != opened[2]["id"]
    assert ended == [1, 0, 1] and summary == {"validation/loss": 2.0}
    assert axes == [("*", "step")] * 3  # log's own argument step refuses the rows of a run that is resumed from before


@pytest.mark.parametrize("text", ["plain", "# a title\n\n    code", "```\nfences\n````", "", "a\nb\n"])
def test_texts_are_shown_as_they_are(text: str) -> None:
    """TensorBoard renders Markdown: none of the text may be taken for it."""
    shown = sinks._verbatim(text)
    first, *body, last = shown.split("\n")
    assert "\n".join(body) == text and first == last and set(first) == {"`"} and len(first) >= 3 and first not in text


def test_files_are_closed_when_the_loop_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(module.JsonLines, "close", lambda self, final: closed.append(self._scalars.close()))
    metrics = Metrics(*run_of(tmp_path, tensorboard=False), FLOPS, 1, 0)
    with pytest.raises(KeyError):
        with metrics:
            metrics.record(1, {"loss": 1.0})
            raise KeyError
    assert len(closed) == 1
    metrics.scalars(2, {"validation/loss": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [1]
