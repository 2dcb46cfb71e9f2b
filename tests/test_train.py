"""The whole program within this process, so that shapes are checked all along: what it writes, and how it ends."""

import json
import os
import re
import signal
from contextlib import closing
from pathlib import Path

import jax
import pytest
from short_runs import metrics, settings

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.errors import FAILED, FINISHED, STOPPED
from mutransformer.model.execution import with_compute
from mutransformer.training import loop as training
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.evaluate import evaluate_run
from mutransformer.training.loop import train
from mutransformer.training.metrics import Diverged
from mutransformer.training.program import build_with_data
from mutransformer.training.run_folder import RunFolder
from mutransformer.training.sinks import board_tag

SHORT = ["steps=6", "eval.every=2", "checkpoint.every=4", "mesh.x=4", "mesh.y=2", "checkpoint.keep=1"]


def test_a_run_writes_what_it_should(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(settings(tmp_path, *SHORT, "name=whole", "model.activation=swiglu", "profile.start=2", "profile.stop=3"))
    assert train(*build_with_data(config)) == FINISHED
    run = tmp_path / "runs" / "whole"
    assert load([str(run / "config.yaml")]) == with_compute(config, jax.devices()[0])
    lines = metrics(run)
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    assert {step for step, line in lines.items() if "validation/loss" in line} == {2, 4, 6}
    assert lines[6]["train/loss"] < lines[1]["train/loss"]
    assert list(run.rglob("*.xplane.pb"))
    kept = {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()}
    losses = {step: line["validation/loss"] for step, line in lines.items() if step in (4, 6)}
    assert kept == {6, min(losses, key=losses.__getitem__)}, "the latest and the best are kept"
    out = capsys.readouterr().out
    assert "8 x cpu, mesh x=4 x y=2" in out and "step 6/6  validation_whole loss" in out

    assert train(*build_with_data(config)) == FINISHED  # nothing is left to do but to score
    assert metrics(run)[6]["train/loss"] == lines[6]["train/loss"]

    found = evaluate_run(*build_with_data(config))
    assert found["model"]["loss"] == pytest.approx(lines[6]["validation_whole/loss"], rel=1e-6)
    assert found["step"] == 6 and found["scored"] == found["tokens"] and found["unigram"]["loss"] > found["bigram"]["loss"] > 0
    assert sum(one["targets"] for one in found["by_position"]) == found["scored"] and found["by_position"][-1]["last"] == 31

    (tmp_path / "other.txt").write_text("7: the 49 of 7 is 49\n")  # too short to be divided
    other = [f"eval.sets.one.files=[{tmp_path}/other.txt]", f"eval.sets.all.files=[{tmp_path}/text.txt, {tmp_path}/other.txt]"]
    capsys.readouterr()
    assert main(["evaluate", str(run), *other]) == FINISHED
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines()[1:])) < 80 and re.search(r"^one +22 +0.95 +\d\.\d+ ", table, re.MULTILINE)
    assert re.search(r"^16-31 +(\d+\.\d{4} +){2}\d+\.\d{4}$", table, re.MULTILINE)
    assert main(["evaluate", str(run), *other, "--json"]) == FINISHED
    again = json.loads(capsys.readouterr().out)
    sets = again.pop("sets")
    assert again | {"sets": {}} == found
    assert (sets["one"]["tokens"], sets["one"]["bytes"]) == (22, 21), "the text with its eos"
    data = (tmp_path / "text.txt").read_bytes()
    assert (sets["all"]["tokens"], sets["all"]["bytes"]) == (len(data) + 23, len(data) + 21)


@pytest.mark.parametrize("steps", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_a_run_of_no_number_fails_and_keeps_no_checkpoint_of_it(
    steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one step, too: its loss is from before the update that breaks the weights."""
    hot = settings(tmp_path, f"steps={steps}", "optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0", "name=hot")
    assert main(["train", *hot]) == FAILED
    assert "error: step 1: the norm of the weights after the update is inf" in capsys.readouterr().err
    assert not list((tmp_path / "runs" / "hot" / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_best_checkpoint_outlives_a_restart_and_can_be_scored(tmp_path: Path) -> None:
    """A rate that ruins the model: the first evaluation stays the best."""
    args = settings(
        tmp_path, "eval.every=2", "checkpoint.every=2", "optim.lr=0.3", "optim.warmup_steps=4", "name=best", "checkpoint.keep=1"
    )
    allow = "checkpoint.allow=[steps]"
    with pytest.raises(Diverged):  # it is saved nevertheless
        train(*build_with_data(load([*args, "steps=4", "optim.schedule=constant"])))
    config = load([*args, "steps=8", "optim.schedule=constant", allow, "eval.checkpoint=best"])
    with pytest.raises(Diverged, match=r"^the run diverged: its final validation loss is \d+.*; lower optim.lr$"):
        train(*build_with_data(config))
    run = tmp_path / "runs" / "best"
    losses = {step: line["validation/loss"] for step, line in metrics(run).items() if "validation/loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 4, "the best is not from before the restart: nothing is shown"
    assert {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()} == {str(best), "8"}
    assert evaluate_run(*build_with_data(config))["step"] == best

    array = max((run / "checkpoints" / str(best) / "state").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 4
    array.write_bytes(data)
    with closing(Checkpoints(config, RunFolder(config.rundir), read_only=True)) as checkpoints:
        assert checkpoints.best() == 8


@pytest.mark.slow
def test_what_pad_cuts_off_is_not_called_scored(tmp_path: Path) -> None:
    args = settings(tmp_path, "steps=1", "data.packing=pad", "data.seq_len=8", "name=pad")
    assert train(*build_with_data(load(args))) == FINISHED
    found = evaluate_run(*build_with_data(load(args)))
    assert 0 < found["scored"] < found["tokens"] and "bigram" not in found


@pytest.mark.slow
def test_a_signal_within_an_evaluation_leaves_no_result_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = settings(tmp_path, "steps=6", "eval.every=3", "name=cut")

    def interrupted(self: training.Trainer, group: str, n_batches: int | None) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, group, n_batches)

    evaluate = training.Trainer.evaluate
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(training.Trainer, "evaluate", interrupted)
    assert train(*build_with_data(load(args))) == STOPPED
    assert signal.getsignal(signal.SIGTERM) == before
    run = tmp_path / "runs" / "cut"
    assert list(metrics(run)) == [1, 2, 3] and "validation/loss" not in metrics(run)[3]
    assert (run / "checkpoints" / "3").is_dir()
    monkeypatch.undo()
    assert train(*build_with_data(load(args))) == FINISHED
    assert list(metrics(run)) == [1, 2, 3, 4, 5, 6]
    assert {step for step, line in metrics(run).items() if "validation/loss" in line} == {3, 6}, "it is made up for"


@pytest.mark.slow
def test_the_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(*build_with_data(load(settings(tmp_path, "steps=3", "name=shown"))))
    run = tmp_path / "runs" / "shown"
    shown = EventAccumulator(str(run)).Reload()
    for tag in ("train/loss", "optim/learning_rate", "norm/update", "validation/bits_per_byte"):
        told = {step: line[tag] for step, line in metrics(run).items() if tag in line}
        assert {e.step: e.value for e in shown.Scalars(board_tag(tag))} == pytest.approx(told)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
