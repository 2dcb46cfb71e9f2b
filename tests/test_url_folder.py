"""A run whose folder is at a URL: an object store without rename, append or locks holds all that the run needs, at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest
from object_store import HIDDEN, ObjectStore, install
from programs import program
from short_runs import events, finish, free_port, kill_at_random, metrics, settings, start, wait_for_step

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.data.cache.store import Corrupt
from mutransformer.errors import FINISHED, USAGE_ERROR, ConfigError
from mutransformer.training import url_folder
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.metrics import setup_logging
from mutransformer.training.run_folder import LOCK, RunFolder
from mutransformer.training.url_checkpoints import _needed
from mutransformer.training.url_folder import Lease, UrlFolder, readable

LENGTH = ["steps=40", "checkpoint.every=7", "eval.every=20"]
SHORT = ["steps=6", "checkpoint.every=2", "eval.every=3"]
HARMS = ["a flipped bit", "a missing object", "a missing seal", "a damaged seal", "another step's seal"]
TRAIN = "scripts/train.py"
WORKDIR = "workdir=objects://bucket/runs"


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("url")


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the stand-in keeps its objects."""
    for key, value in install(tmp_path / "store").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(url_folder, "SETTLED_AFTER", 0.05)
    return tmp_path / "store/objects/bucket/runs"


def at_url(folder: Path, *more: str) -> list[str]:
    return settings(folder, WORKDIR, f"data.local_dir={folder / 'local'}", *more)


def state_and_position(args: list[str]) -> tuple[Any, dict[str, Any]]:
    config = load(args)
    with readable(config) as folder, closing(Checkpoints(config, folder, read_only=True)) as checkpoints:
        step = checkpoints.latest()
        assert step is not None and step == config.steps
        return checkpoints.restore(step, program(config, jax.devices()[:1]).state)


def assert_same_run(run: Path, args: list[str], whole: Path, whole_args: list[str]) -> None:
    """The same losses, norms, state and TensorBoard's numbers, bit for bit."""
    ours, theirs = metrics(run), metrics(whole)
    assert list(ours) == list(theirs)
    for step, line in theirs.items():
        tags = {tag for tag in line if not tag.startswith(("speed/", "memory/", "time"))}
        assert {tag: ours[step].get(tag) for tag in tags} == {tag: line[tag] for tag in tags}, f"step {step}"
    jax.tree.map(np.testing.assert_array_equal, state_and_position(args), state_and_position(whole_args))
    found, expected = ([(tag, step) for tag, step, _ in events(one) if not tag.startswith("speed/")] for one in (run, whole))
    assert sorted(found) == sorted(expected), "a number is missing, or there twice"


def checkpoints_in(run: Path) -> dict[int, bool]:
    """The steps of which there are objects, and whether they have a seal."""
    files = [path for path in (run / "checkpoints").glob("*/**/*") if path.is_file() and not path.name.startswith(HIDDEN)]
    steps = {int(path.relative_to(run / "checkpoints").parts[0]) for path in files}
    return {step: bool(list((run / "checkpoints" / str(step)).glob("sha256.*"))) for step in steps}


@pytest.fixture(scope="module")
def whole(module_folder: Path) -> Path:
    """A run on the disk that was not interrupted."""
    finish(start(TRAIN, settings(module_folder, *LENGTH, "name=whole"), quick=True))
    return module_folder / "runs/whole"


@pytest.mark.slow
def test_a_run_at_a_url_is_one_on_the_disk(
    module_folder: Path, whole: Path, bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when it was killed and resumed; evaluate, generate and doctor find it by its URL. Nothing is left on this machine."""
    args, run = at_url(module_folder, *LENGTH, "name=r"), bucket / "r"
    process = start(TRAIN, args, quick=True)
    wait_for_step(process, run, 14)
    process.send_signal(signal.SIGKILL)
    finish(process, expect=-signal.SIGKILL)
    assert "resumes after step" in finish(start(TRAIN, args, quick=True))
    assert_same_run(run, args, whole, settings(module_folder, *LENGTH, "name=whole"))
    assert not (run / LOCK).exists() and (run / "config.yaml").is_file()
    assert sorted(checkpoints_in(run)) == sorted(checkpoints_in(whole)) == [35, 40]
    more = [f"data.cache_dir={module_folder / 'cache'}", f"data.local_dir={module_folder / 'local'}"]
    capsys.readouterr()
    assert main(["evaluate", "objects://bucket/runs/r", "--json", *more]) == FINISHED
    loss = metrics(whole)[40]["validation_whole/loss"]
    assert json.loads(capsys.readouterr().out)["model"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert main(["generate", "objects://bucket/runs/r", *more, "--prompt", "1", "--tokens", "3"]) == FINISHED
    assert main(["doctor", "objects://bucket/runs/r", *more]) == FINISHED
    out = capsys.readouterr().out
    assert "PASS  checkpoints: step 35 intact; step 40 intact" in out
    assert [path.name for path in (module_folder / "local").iterdir() if path.name.startswith(".run")] == []


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(module_folder: Path, whole: Path, bucket: Path) -> None:
    """With a checkpoint at every second step, some of them within an upload."""
    args, run = at_url(module_folder, *LENGTH, "checkpoint.every=2", "name=often"), bucket / "often"
    kills, within_an_upload = kill_at_random(args, run, 39, lambda: not all(checkpoints_in(run).values()))
    assert kills >= 15 and within_an_upload >= 2, f"{kills} kills, {within_an_upload} within an upload"
    finish(start(TRAIN, args, quick=True))
    assert_same_run(run, args, whole, settings(module_folder, *LENGTH, "name=whole"))
    assert all(checkpoints_in(run).values()), "something is left of an upload that was interrupted"


@pytest.mark.slow
def test_each_process_moves_only_its_own_shards(bucket: Path, module_folder: Path) -> None:
    """Of a run that is stopped after four steps and goes on, and is then the run that was not stopped, bit for bit."""

    def run(name: str, *more: str) -> None:
        shared = [f"distributed.coordinator=127.0.0.1:{free_port()}", "distributed.n_process=2", "mesh.x=2", "mesh.y=1"]
        args = at_url(
            module_folder, *SHORT, "precision.compute=float32", "optim.schedule=constant", f"name={name}", *more, *shared
        )
        for process in [start(TRAIN, [*args, f"distributed.process_id={i}"], quick=True) for i in range(2)]:
            finish(process)

    run("two", "steps=4")
    seals = [json.loads((bucket / f"two/checkpoints/4/sha256.{i}-of-2.json").read_text())["files"] for i in range(2)]
    assert not set(seals[0]) & set(seals[1]), "a file was uploaded twice"
    sizes = [sum(file["bytes"] for file in files.values()) for files in seals]
    assert sizes[1] > sizes[0] / 2, "a process uploaded the shards of the other"
    run("two", "checkpoint.allow=[steps]")
    run("whole")
    ours, theirs = metrics(bucket / "two"), metrics(bucket / "whole")
    assert list(ours) == list(range(1, 7)) and [ours[step]["train/loss"] for step in ours] == [
        theirs[step]["train/loss"] for step in theirs
    ]
    states = [state_and_position(at_url(module_folder, f"name={name}", "steps=6"))[0] for name in ("two", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_process_needs_the_chunks_that_its_devices_overlap(tmp_path: Path) -> None:
    """An array of 8 x 6 in chunks of 2 x 3, saved by four by two devices, for a process that has rows 4 to 7."""

    class Sharding:
        def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[int, tuple[slice, ...]]:
            return {0: (slice(4, 6), slice(None)), 1: (slice(6, None), slice(0, 6))} if shape else {0: ()}

    class Array:
        def __init__(self, *shape: int) -> None:
            self.shape, self.sharding = shape, Sharding()

    for name, chunks in {"w": [2, 3], "n": []}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ".zarray").write_text(json.dumps({"chunks": chunks}))
    saved = {f"state/w/{i}.{j}" for i in range(4) for j in range(2)} | {"state/n/0"}
    expected = {"state/w/2.0", "state/w/2.1", "state/w/3.0", "state/w/3.1", "state/n/0"}
    assert _needed(saved, {"w": Array(8, 6), "n": Array()}, tmp_path) == expected
    with pytest.raises(Corrupt, match="state/gone"):
        _needed(saved, {"gone": Array(8, 6)}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_not_used(
    harm: str, module_folder: Path, bucket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = at_url(module_folder, *SHORT, "name=d")
    saved = module_folder / "six-steps"
    if not saved.exists():
        assert main(["train", *args]) == FINISHED
        shutil.copytree(bucket / "d", saved)
    shutil.copytree(saved, bucket / "d", dirs_exist_ok=True)
    latest, seal = bucket / "d/checkpoints/6", bucket / "d/checkpoints/6/sha256.0-of-1.json"
    chunk = next(path for path in sorted(latest.rglob("0.0*")))
    if harm == "a flipped bit":
        chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    elif harm == "a missing object":
        chunk.unlink()
    elif harm == "a missing seal":
        seal.unlink()
    elif harm == "a damaged seal":
        seal.write_text("{")
    else:
        seal.write_text((bucket / "d/checkpoints/4/sha256.0-of-1.json").read_text())
    config = load(args)
    setup_logging()
    with readable(config) as folder, closing(Checkpoints(config, folder, read_only=True)) as checkpoints:
        assert checkpoints.latest() == 4
    assert chunk.exists() or harm == "a missing object", "reading removed something"
    assert ("6 is corrupt" in capsys.readouterr().out) == (harm != "a missing seal")
    assert main(["train", *args]) == FINISHED, "the step is trained and saved again"
    state_and_position(args)


@pytest.mark.slow
def test_a_store_that_fails_for_a_while_costs_a_line(
    module_folder: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload, failed = ObjectStore.put_file, []

    def refuse(self: ObjectStore, file: str, url: str, *of: Any, **more: Any) -> None:
        if "/checkpoints/2/" in url:
            failed.append(url)
            raise RuntimeError("503 Slow down")
        upload(self, file, url, *of, **more)

    monkeypatch.setattr(ObjectStore, "put_file", refuse)
    args = at_url(module_folder, *SHORT, "name=f")
    assert main(["train", *args]) == FINISHED and failed
    out = capsys.readouterr().out
    assert "saving a checkpoint failed" in out and "503 Slow down" in out and "the run goes on" in out
    state_and_position(args)


# The lock


def test_a_folder_at_a_url_has_one_owner(
    module_folder: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(url_folder, "RENEW_EVERY", 0.2)
    args = at_url(module_folder, *SHORT, "name=o")
    with UrlFolder("objects://bucket/runs/o", str(module_folder / "local")).owned():
        assert main(["train", *args]) == USAGE_ERROR
        assert f"in use by process {os.getpid()} on host" in capsys.readouterr().err
        assert not (bucket / "o/checkpoints").exists()
    assert not (bucket / "o" / LOCK).exists()


def write_lock(bucket: Path, **changes: Any) -> Path:
    """Leaves the lock of another process, which gives no sign any more."""
    store = UrlFolder("objects://bucket/runs/o", str(bucket / "local")).store
    lock = bucket / "o" / LOCK
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({**Lease(store)._lock, "renewed": 0.0, **changes}))
    return lock


@pytest.mark.parametrize("holder", ["ended", "on another machine", "stopped", "unreadable"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(holder: str, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_folder, "LAPSED_AFTER", 1.5)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    changes = {"ended": {"pid": ended.pid}, "on another machine": {"pid": ended.pid, "machine": "other"}}
    lock = write_lock(bucket, **changes.get(holder, {}))
    if holder == "unreadable":
        lock.write_text("{")
    began, folder = time.monotonic(), UrlFolder("objects://bucket/runs/o", str(bucket / "local"))
    folder.check_free()
    waited, began = time.monotonic() - began > 1.5, time.monotonic()
    with folder.owned():
        assert time.monotonic() - began < 1, "it waits once, not again for what it has waited for"
    assert waited == (holder in ("on another machine", "stopped")), "only what is known to be gone needs no wait"


def test_two_that_come_at_once_never_both_have_the_folder(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_folder, "SETTLED_AFTER", 0.5)
    monkeypatch.setattr(url_folder, "RENEW_EVERY", 0.1)
    both, owners, most = threading.Barrier(2), 0, list[int]()

    def take() -> None:
        nonlocal owners
        both.wait()
        with suppress(ConfigError), UrlFolder("objects://bucket/runs/o", str(bucket / "local")).owned():
            owners += 1
            most.append(owners)
            time.sleep(1)
            owners -= 1

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most, default=0) == 1


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_a_run_that_lost_its_folder_publishes_nothing_more(how: str, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_folder, "RENEW_EVERY", 0.1)
    folder: RunFolder = UrlFolder("objects://bucket/runs/o", str(bucket / "local"))
    with folder.owned():
        folder.check_present()
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = bucket / "o" / LOCK
        if how == "removed":
            lock.unlink()
        else:
            lock.write_text(json.dumps({**json.loads(lock.read_text()), "id": "other", "pid": 77}))
        time.sleep(1)
        with pytest.raises(ConfigError, match="process 77" if how == "taken over" else "removed"):
            folder.check_present()
        folder.write("late.txt", b"x")
    assert not (bucket / "o/late.txt").exists() and lock.exists() == (how == "taken over")


def test_only_what_changed_is_uploaded_and_what_is_removed_goes(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = UrlFolder("objects://bucket/runs/o", str(bucket / "local"))
    for name in ("metrics.jsonl", "events.1", "checkpoints/validation_losses.json", "checkpoints/3/state/w"):
        (bucket / "o" / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / "o" / name).write_text("old")
    folder.pull()
    assert not (folder.path / "checkpoints/3").exists(), "checkpoints are copied when they are restored"
    uploaded, pipe_file = list[str](), fsspec.AbstractFileSystem.pipe_file

    def write(self: Any, url: str, *of: Any, **more: Any) -> None:
        uploaded.append(url.rpartition("/")[2])
        pipe_file(self, url, *of, **more)

    monkeypatch.setattr(ObjectStore, "pipe_file", write)
    folder.publish()
    assert uploaded == []
    folder.write("metrics.jsonl", b"new")
    (folder.path / "events.1").unlink()
    (folder.path / "events.2").write_text("new")
    folder.publish()
    assert sorted(uploaded) == ["events.2", "metrics.jsonl"]
    found = {path.relative_to(bucket / "o").as_posix() for path in (bucket / "o").rglob("*") if path.is_file()}
    kept = {"metrics.jsonl", "checkpoints/validation_losses.json", "checkpoints/3/state/w"}
    assert found == {*kept, "events.2"}
