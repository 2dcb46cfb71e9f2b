"""The file of a sweep's runs: what is appended is read, a killed writer is mended, and what is no run is refused by its line."""

import dataclasses
import json
import math
import re

import pytest
from sweeps import make_run, sweep

from mutransformer.errors import ConfigError
from mutransformer.study.sweep.records import FILE, append, join, mend, read


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "new" / FILE
    runs = [make_run("mup", 64, -6, 0, 4.1 + 1e-15), make_run("mup model.qk_scale=0.25", 128, -2, 1, math.inf)]
    append(path, runs[:1])
    append(path, runs[1:])
    assert read(path) == read(path.parent) == runs
    assert runs[0].loss == 4.1 + 1e-15 and runs[1].loss == math.inf and runs[1].validation_loss is None
    assert not mend(path)


def test_a_line_cut_short_is_told_and_mended(tmp_path):
    path = tmp_path / FILE
    assert not mend(path)
    runs = sweep(widths=[64])
    append(path, runs)
    whole = path.read_bytes()
    for cut in (1, 2, 40):
        path.write_bytes(whole[:-cut])
        if cut > 1:  # without its newline alone the line is still a run
            with pytest.raises(ConfigError, match=rf"{FILE}:{len(runs)}: cut short; the same sweep, run again, mends it"):
                read(path)
        assert mend(path) and not mend(path)
        assert read(path) == runs[:-1]
    path.write_bytes(whole[:10])
    assert mend(path) and path.read_bytes() == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": None}, "not the kind of value that it needs: width"),
        ({"width": "64"}, "not the kind of value that it needs: width"),
        ({"width": 0}, "not the kind of value that it needs: width"),
        ({"seed": True}, "not the kind of value that it needs: seed"),
        ({"lr": -1.0, "status": "lost"}, "not the kind of value that it needs: lr, status"),
        ({"train_loss": ["a"] * 20}, "not the kind of value that it needs: train_loss"),
        ({"logged": 3}, "not the kind of value that it needs: logged"),
        ({"variant": 1, "settings": []}, "not the kind of value that it needs: settings, variant"),
        ({"validation_loss": math.nan}, "not JSON: NaN is no number of JSON's"),
        ({"diverged_at": 1.5, "seconds": "long"}, "not the kind of value that it needs: diverged_at, seconds"),
        ({"train_loss": [1.0]}, "as many losses as logged steps"),
        ({"logged": [], "train_loss": []}, "as many losses as logged steps, and at least one"),
        ({"logged": [2] * 20}, "logged: the steps must ascend"),
        ({"more": 1}, "not a run: needs exactly the keys diverged_at, "),
    ],
    ids=str,
)
def test_what_is_no_run(change, message, tmp_path):
    good = dataclasses.asdict(make_run("mup", 64, -6, 0, 4.0))
    path = tmp_path / FILE
    path.write_text("\n".join(json.dumps(line) for line in (good, good | change, good)) + "\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        read(path)


def test_what_is_no_number_of_json_is_no_run(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(make_run("mup", 64, -6, 0, 4.0))).replace("4.0", "1e999"))
    with pytest.raises(ConfigError, match="needs: train_loss, validation_loss"):
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
def test_what_is_no_file_of_runs(content, message, tmp_path):
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
def test_a_run_that_is_there_twice_must_have_the_same_losses(change, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run = make_run("mup", 64, -6, 3, 4.0)
    append(one, [run])
    append(two, [dataclasses.replace(run, **change)])
    with pytest.raises(ConfigError, match=f"{two}: mup, width 64, lr 0.015625, seed 3 is there twice .*; the other is in {one}"):
        join([one, two])
