"""runs.jsonl: appended runs are read back, a truncated file is repaired, and invalid lines are refused by file and line."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from sweeps import make_run, sweep

from mutransformer.errors import ConfigError
from mutransformer.mup.checks.runs import Run
from mutransformer.study.sweep.records import FILE, append, join, read, repair


def test_appended_runs_are_read_back(tmp_path):
    path = tmp_path / "new" / FILE
    runs = [make_run("mup", 64, -6, 0, 4.1 + 1e-15), make_run("mup model.qk_scale=0.25", 128, -2, 1, math.inf)]
    append(path, runs[:1])
    append(path, runs[1:])
    assert read(path) == read(path.parent) == runs
    assert runs[0].loss == 4.1 + 1e-15 and runs[1].loss == math.inf and runs[1].validation_loss is None
    assert not repair(path)


def test_a_truncated_line_is_reported_and_repaired(tmp_path):
    path = tmp_path / FILE
    assert not repair(path)
    runs = sweep(widths=[64])
    append(path, runs)
    complete = path.read_bytes()
    for cut in (1, 2, 40):
        path.write_bytes(complete[:-cut])
        if cut > 1:  # a line that lacks only its newline is still valid
            with pytest.raises(ConfigError, match=rf"{FILE}:{len(runs)}: truncated line; re-run the sweep to repair it"):
                read(path)
        assert repair(path) and not repair(path)
        assert read(path) == runs[:-1]
    path.write_bytes(complete[:10])
    assert repair(path) and path.read_bytes() == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": None}, "wrong type or out of range: width"),
        ({"width": "64"}, "wrong type or out of range: width"),
        ({"width": 0}, "wrong type or out of range: width"),
        ({"seed": True}, "wrong type or out of range: seed"),
        ({"lr": -1.0, "status": "lost"}, "wrong type or out of range: lr, status"),
        ({"train_loss": ["a"] * 20}, "wrong type or out of range: train_loss"),
        ({"logged": 3}, "wrong type or out of range: logged"),
        ({"variant": 1, "settings": []}, "wrong type or out of range: settings, variant"),
        ({"validation_loss": math.nan}, "wrong type or out of range: validation_loss"),
        ({"train_loss": [1.0] * 19 + [math.inf]}, "wrong type or out of range: train_loss"),
        ({"train_loss": [1.0] * 19 + [1]}, "wrong type or out of range: train_loss"),
        ({"logged": [*range(19), 20.0]}, "wrong type or out of range: logged"),
        ({"lr": 1, "seconds": 2}, "wrong type or out of range: lr, seconds"),
        ({"diverged_at": 1.5, "seconds": "long"}, "wrong type or out of range: diverged_at, seconds"),
        ({"train_loss": [1.0]}, "logged and train_loss must have equal lengths"),
        ({"logged": [], "train_loss": []}, "logged and train_loss must have equal lengths, at least 1"),
        ({"logged": [2] * 20}, "logged: the steps must ascend"),
        ({"more": 1}, "not a run: needs exactly the keys diverged_at, "),
    ],
    ids=str,
)
def test_invalid_runs_are_refused(change, message, tmp_path):
    good = dataclasses.asdict(make_run("mup", 64, -6, 0, 4.0))
    path = tmp_path / FILE
    path.write_text("\n".join(json.dumps(line) for line in (good, good | change, good)) + "\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        read(path)


def test_an_infinite_number_is_refused(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(make_run("mup", 64, -6, 0, 4.0))).replace("4.0", "1e999"))
    with pytest.raises(ConfigError, match="out of range: train_loss, validation_loss"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read it: No such file"),
        (b"", "holds no runs"),
        (b"\xff\n", "cannot read it: .*invalid start byte"),
        (b"[1]\n", ":1: not a run"),
        (b"{\n{}\n", ":1: not JSON"),
    ],
)
def test_invalid_files_are_refused(content, message, tmp_path):
    path = tmp_path / FILE
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_files_are_joined(tmp_path):
    one, two = tmp_path / "one" / FILE, tmp_path / "two" / FILE
    runs = sweep()
    append(one, runs[:40])
    again = [dataclasses.replace(run, seconds=9.0) for run in runs[30:]]
    append(two, again)
    assert join([one.parent, two]) == runs[:40] + again[10:]
    assert join([one, one]) == runs[:40]


@pytest.mark.parametrize("change", [{"validation_loss": 1.0}, {"train_loss": [1.0] * 20}])
def test_a_repeated_run_must_have_the_same_losses(change, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run = make_run("mup", 64, -6, 3, 4.0)
    append(one, [run])
    append(two, [dataclasses.replace(run, **change)])
    with pytest.raises(ConfigError, match=f"{two}: mup, width 64, lr 0.015625, seed 3 is repeated .*; the other is in {one}"):
        join([one, two])


def test_runs_of_other_depth_steps_or_batch_are_other_runs(tmp_path):
    run = make_run("mup", 64, -6, 3, 4.0)
    settings = {"model.n_layer": 2}, {"data.batch_size": 4}, {"data.batch_size": 8}
    others = [dataclasses.replace(run, settings=run.settings | more, validation_loss=3.0) for more in settings]
    others.append(dataclasses.replace(run, steps=400, validation_loss=3.0))
    append(tmp_path / FILE, [run, *others])
    assert join([tmp_path]) == [run, *others]
    default = dataclasses.replace(run, settings=run.settings | {"model.n_layer": 6}, validation_loss=3.0)
    append(tmp_path / FILE, [default])  # the default, written out: the same run
    with pytest.raises(ConfigError, match="seed 3 is repeated with different losses"):
        join([tmp_path])


@pytest.mark.parametrize(
    ("first", "final", "status"),
    [
        (6.9, 708_088.0, "diverged"),
        (6.9, 21.0, "diverged"),
        (6.9, math.inf, "diverged"),
        (6.9, math.nan, "diverged"),
        (6.9, 20.6, "finished"),
        (6.9, 3.0, "finished"),
        (0.3, 2.2, "finished"),
        (0.3, 2.4, "diverged"),
    ],
)
def test_a_run_whose_loss_rose_far_diverged_though_all_is_finite(first: float, final: float, status: str) -> None:
    losses = np.linspace(first, first + 1, 20)
    run = Run.of("mup", 64, 0.01, 0, losses, final, 5, seconds=1.0, settings={})
    assert run.status == status and (run.loss == math.inf) == (status == "diverged")
