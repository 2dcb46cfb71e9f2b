"""What goes wrong around a run: signals, a full disk, a folder in use or removed, damaged files. Nothing is lost or silent."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_unless
from short_runs import events, finish, metrics, settings, start, wait_for_step

from mutransformer.cli import main
from mutransformer.commands import start_jax
from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.errors import FAILED, FINISHED, STOPPED, USAGE_ERROR, ConfigError
from mutransformer.sharding.stopping import SIGNALS, Stopped, stop_on_signals
from mutransformer.training import sinks
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.checkpoint_storage import DiskStorage
from mutransformer.training.program import Program
from mutransformer.training.run_folder import LOCK, RunFolder

SHORT = ["steps=6", "checkpoint.every=2", "eval.every=0", "eval.final_batches=1", "checkpoint.keep=3"]
TRAIN = "scripts/train.py"
SLOW = pytest.mark.slow


@pytest.fixture
def args(tmp_path: Path) -> list[str]:
    return settings(tmp_path, *SHORT, "name=r")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "r"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder above runs/r, a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", *settings(folder, *SHORT, "name=r")]) == FINISHED
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The folder above a copy of a finished run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


# Ways to end.


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_once_and_an_end_where_nothing_is_half_done(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested and stop.poll() and stop.signal == number.name
        with pytest.raises(Stopped, match=number.name), stop.at_once():
            pytest.fail("it was asked to stop before")
    with stop_on_signals() as stop, pytest.raises(Stopped, match=number.name), stop.at_once():
        os.kill(os.getpid(), number)
        pytest.fail("it was asked to stop")


def test_a_second_ctrl_c_ends_at_once_and_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested, "nohup"
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [pytest.param(each, marks=SLOW) for each in SIGNALS])
def test_a_signal_saves_and_asks_to_be_started_again(number: signal.Signals, tmp_path: Path, run: Path) -> None:
    process = start(TRAIN, settings(tmp_path, "steps=100000", "eval.every=0", "name=r"), quick=True)
    wait_for_step(process, run, 3)
    process.send_signal(number)
    out = finish(process, expect=STOPPED)
    last = max(metrics(run))
    assert f"Stopped at step {last}; checkpoint saved." in out and (run / "checkpoints" / str(last)).is_dir()


def test_a_signal_is_answered_while_data_are_prepared(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr("mutransformer.training.program.prepare", killed)
    assert main(["train", *args]) == STOPPED
    assert capsys.readouterr().err == "stopped by SIGTERM, before the first step; the same command starts again\n"


def test_a_batch_that_never_comes_does_not_delay_the_answer(args: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mutransformer.data.batches.pipeline import Batches

    given = Batches.__next__

    def stuck(self: Batches) -> object:
        if self.get_state()["next_index"] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
            pytest.fail("it waited on")
        return given(self)

    monkeypatch.setattr(Batches, "__next__", stuck)
    assert main(["train", *args]) == STOPPED
    assert max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["head -n 12", "true"])
def test_a_run_outlives_its_console(reader: str, args: list[str], run: Path) -> None:
    process = start(TRAIN, [*args, "steps=40", "log.every=1"], quick=True)
    head = subprocess.Popen(reader.split(), stdin=process.stdout, stdout=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.close()
    head.wait(60)
    process.communicate()
    assert process.returncode == FINISHED
    assert max(metrics(run)) == 40


@pytest.mark.slow
def test_ctrl_c_to_a_run_and_to_what_shows_it_saves(args: list[str], run: Path, tmp_path: Path) -> None:
    """As a terminal sends it to `mutransformer train ... | tee x.log`: the console is gone while the run saves."""
    process = start(TRAIN, [*args, "steps=2000", "log.every=1", "checkpoint.every=0"], quick=True)
    tee = subprocess.Popen(["tee", tmp_path / "x.log"], stdin=process.stdout, stdout=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.close()
    wait_for_step(process, run, 5)
    for each in (process, tee):
        each.send_signal(signal.SIGINT)
    assert tee.wait(60) == -signal.SIGINT
    process.communicate(timeout=60)
    assert process.returncode == STOPPED
    (saved,) = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved == max(metrics(run)) >= 5


# The disk.


@pytest.mark.parametrize("code", [errno.ENOSPC, *(pytest.param(each, marks=SLOW) for each in (errno.EROFS, errno.EIO))])
def test_a_run_goes_on_without_a_sink_that_fails(
    code: int, args: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = sinks.EventFile.scalars

    def fail(self: sinks.EventFile, step: int, values: dict[str, float], when: float | None = None) -> None:
        if step == 3:
            raise OSError(code, os.strerror(code))
        written(self, step, values, when)

    monkeypatch.setattr(sinks.EventFile, "scalars", fail)
    assert main(["train", *args]) == FINISHED
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "events.out" in line]
    assert line == f"warning: {run}/events.out.tfevents.* cannot be written: {os.strerror(code)}; training goes on without"
    assert list(metrics(run)) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_cannot_be_saved_is_one_line_and_the_next_may_be(
    args: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: DiskStorage) -> None:
        if not (run / "checkpoints" / "4").exists() and not list((run / "checkpoints").glob("4.*")):
            raise OSError(errno.ENOSPC, "No space left on device")

    sealed = DiskStorage._seal_all
    monkeypatch.setattr(DiskStorage, "_seal_all", lambda self: (full(self), sealed(self)))
    assert main(["train", *args]) == FINISHED
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("warning: ")]) == 1
    assert f"warning: {run}/checkpoints: saving a checkpoint failed: No space left on device; " in out
    assert "GB are free there; the run goes on, and tries again when the next checkpoint is due" in out
    assert {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()} == {"4", "6"}


def test_checkpoints_that_will_not_fit_are_refused_before_training(
    args: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200 << 10, before[1]))
    assert main(["train", *args]) == USAGE_ERROR
    assert "no file may be larger than 0.2 MB (ulimit -f)" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 3_000_000))
    assert main(["train", *args]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert "and 3 of them must fit, but only 3.0 MB are free there; make room" in err and not metrics(run)


@pytest.mark.parametrize("where", ["runs", "runs/r", "runs/r/checkpoints"])
def test_a_file_in_the_place_of_a_folder_is_told_before_training(
    where: str, args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    assert main(["train", *args]) == USAGE_ERROR
    out, err = capsys.readouterr()
    assert str(file) in err and len(err.splitlines()) == 1 and "tokeniz" not in out and file.read_text() == "mine"


# The folder.


def test_a_folder_has_one_owner(args: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(run).owned():
        assert main(["train", *args]) == USAGE_ERROR
        with pytest.raises(ConfigError, match="in use by"), RunFolder(run).owned():
            pytest.fail("it has two")
    err = capsys.readouterr().err
    assert f"{run}: in use by process {os.getpid()} on host {os.uname().nodename} since 20" in err
    with RunFolder(run).owned():  # it was given back
        pass


def test_a_file_system_without_locks_costs_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunFolder(run).owned():
        assert "its file system has no locks (No locks available): start no second run in it" in caplog.text


def test_the_folder_of_a_killed_run_is_free(run: Path) -> None:
    code = "import os; from pathlib import Path; from mutransformer.training.run_folder import RunFolder\n"
    code += f"with RunFolder(Path({str(run)!r})).owned(): os.kill(os.getpid(), 9)"
    assert subprocess.run(["python", "-c", code], cwd=Path(__file__).parent.parent).returncode != 0
    with RunFolder(run).owned():
        pass


def test_a_folder_that_is_removed_ends_the_run_at_the_next_save(
    args: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = Checkpoints.save

    def save_and_lose(self: Checkpoints, *of: Any) -> None:
        saved(self, *of)
        self.wait()
        shutil.rmtree(run)

    monkeypatch.setattr(Checkpoints, "save", save_and_lose)
    assert main(["train", *args]) == USAGE_ERROR
    assert f"{run}: the folder was removed or replaced while the run was going on" in capsys.readouterr().err


def test_a_folder_given_by_a_link_is_that_run(copy: Path) -> None:
    """A link is a name for a run: its own name counts, and where it leads is what is read."""
    (copy / "runs/latest").symlink_to(copy / "runs/r")
    config = load([str(copy / "runs/latest")])
    assert config.rundir == copy / "runs/latest" and config.rundir.resolve() == copy / "runs/r"
    checkpoints = open_checkpoints(config, read_only=True)
    assert checkpoints.latest() == 6
    checkpoints.close()


def test_half_files_of_a_killed_run_are_removed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "checkpoints").mkdir(parents=True)
    (run / ".mine.txt").write_text("kept")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    for folder in (run, run / "checkpoints"):
        with pytest.raises(KeyboardInterrupt):
            RunFolder(folder).write("config.yaml", b"x")
        assert len(list(folder.glob(".config.yaml.*"))) == 1
    monkeypatch.undo()
    with RunFolder(run).owned():
        assert {path.name for path in run.rglob("*")} == {"checkpoints", LOCK, ".mine.txt"}


@pytest.mark.parametrize("lock", ["link", "folder"])
def test_what_is_no_lock_is_named(lock: str, args: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.mkdir(parents=True)
    (run / LOCK).symlink_to("nowhere") if lock == "link" else (run / LOCK).mkdir()
    assert main(["train", *args]) == USAGE_ERROR
    assert capsys.readouterr().err == f"error: {run / LOCK}: not a file of the run's own; remove it\n"
    assert not (run / "nowhere").exists() and not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", ": holds no settings"), (b"na", ": must hold `key: value` lines"), (b"\xff", ": cannot read it: not UTF-8 at byte 0")]
    + [(None, ": cannot read it: Is a directory"), (b"a: [", ":1: not valid YAML"), (b"stepz: 1", ": stepz: no such key")],
)
def test_a_damaged_config_of_a_run_is_named(data: bytes | None, message: str, run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").mkdir() if data is None else (run / "config.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=f"^{run}/config.yaml{message}"):
        load([str(run)])


@pytest.mark.parametrize("name", ["config.yaml", pytest.param("metrics.jsonl", marks=SLOW), LOCK])
def test_a_link_in_a_run_folder_is_never_written_through(name: str, args: list[str], run: Path, tmp_path: Path) -> None:
    run.mkdir(parents=True)
    (elsewhere := tmp_path / "elsewhere").write_text("mine\n")
    (run / name).symlink_to(elsewhere)
    assert main(["train", *args]) == (USAGE_ERROR if name == LOCK else FINISHED)
    assert elsewhere.read_text() == "mine\n" and (run / name).is_symlink() == (name == LOCK)


# Before the first step, and at the end.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["steps=4", "checkpoint.allow=[steps]"], "steps = 4: the run's latest checkpoint is of step 6; set more steps, or"),
        (["optim.lr=0.5"], r"optim.lr was 0.015625, is 0.5"),
    ],
)
def test_a_run_behind_its_checkpoint_is_refused(
    more: list[str], message: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "runs/r/config.yaml").read_text()
    assert main(["train", *settings(copy, *SHORT, "name=r", *more)]) == USAGE_ERROR
    assert message in capsys.readouterr().err and (copy / "runs/r/config.yaml").read_text() == before


def test_a_finished_run_has_nothing_to_do_and_writes_nothing_twice(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, args = copy / "runs/r", settings(copy, *SHORT, "name=r")
    assert main(["train", *args]) == FINISHED  # the folder has moved: the first time for this place
    before, seen = (run / "metrics.jsonl").read_text(), events(run)
    capsys.readouterr()
    assert main(["train", *args]) == FINISHED
    assert "finished, step 6/6, validation loss" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before and events(run) == seen


@pytest.mark.slow
def test_no_step_is_twice_or_missing_in_tensorboard_after_a_kill(tmp_path: Path, run: Path) -> None:
    args = settings(tmp_path, "steps=40", "checkpoint.every=16", "eval.every=16", "name=r")
    process = start(TRAIN, args, quick=True)
    wait_for_step(process, run, 25)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert {step for tag, step, _ in events(run) if tag == "loss/train"} >= set(range(1, 26))
    finish(start(TRAIN, args, quick=True))
    found = [(tag, step) for tag, step, _ in events(run)]
    assert len(found) == len(set(found))
    lines = metrics(run)
    assert [step for tag, step in found if tag == "loss/train"] == list(lines) == list(range(1, 41))
    shown = {step: {sinks.board_tag(tag): value for tag, value in line.items()} for step, line in lines.items()}
    for tag, step, value in events(run):
        assert value == pytest.approx(shown[step][tag], rel=1e-6)


def test_a_validation_split_without_text_is_told_before_training(
    args: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := run.parent.parent / "d.jsonl").write_text("".join(f'{{"text": "{i} and {i * i} and so on"}}\n' for i in range(50)))
    assert main(["train", *args, "data.source=jsonl", f"data.files=[{file}]", "data.validation_fraction=1e-9"]) == USAGE_ERROR
    assert "validation" in capsys.readouterr().err and not metrics(run)


@pytest.mark.parametrize(("steps", "warmup", "told"), [(20, 100, "0.2 x optim.lr"), (20, 20, "1 x optim.lr"), (21, 20, "")])
def test_a_run_within_its_warm_up_is_told(steps: int, warmup: int, told: str, tmp_path: Path) -> None:
    found = load(settings(tmp_path, f"steps={steps}", f"optim.warmup_steps={warmup}")).warnings()
    assert bool(found) == bool(told) and all(told in line for line in found)


@pytest.mark.parametrize("trains", [True, False])
def test_only_what_trains_tells_of_the_warm_up(trains: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_jax(load(settings(tmp_path, "steps=20", "optim.warmup_steps=100")), trains)
    assert sum("within its warm-up" in text for text in capsys.readouterr()) == trains


def test_a_schedule_that_jumps_is_told(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *settings(copy, *SHORT, "name=r", "steps=12", "checkpoint.allow=[steps]")]) == FINISHED
    assert "after step 6 the learning rate is 0.01, before it was 1.6e-06" in capsys.readouterr().out


def test_a_loss_above_that_of_no_knowledge_is_a_failure(args: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *args, "optim.lr=1e5", "optim.warmup_steps=0", "optim.schedule=constant"]) == FAILED
    assert "error: the run diverged: its final validation loss is " in capsys.readouterr().err
    assert (run / "checkpoints" / "6").is_dir()


# Damaged checkpoints.


def open_checkpoints(config: Config, **options: bool) -> Checkpoints:
    return Checkpoints(config, RunFolder(config.rundir), **options)


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [flip, lambda path: os.truncate(path, 1), Path.unlink, lambda path: path.write_bytes(b""), replace]


@pytest.mark.parametrize(("damage",), slow_unless([(flip,), (Path.unlink,)], [(damage,) for damage in DAMAGES]))
def test_any_damage_to_any_file_falls_back_in_one_line(
    damage: Callable[[Path], object], finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = 0
    for name in files_of(finished / "runs/r/checkpoints/6"):
        folder = tmp_path / str(seen)
        shutil.copytree(finished / "runs/r", folder / "r")
        damage(folder / "r/checkpoints/6" / name)
        caplog.clear()
        checkpoints = open_checkpoints(load(settings(finished, *SHORT, "name=r", f"workdir={folder}")))
        if name in ("_CHECKPOINT_METADATA", "commit_success.txt"):  # Orbax writes them last; their content is not used
            assert checkpoints.latest() == 6
        else:
            assert checkpoints.latest() == 4, name
            assert len(caplog.messages) == 1 and "checkpoints/6 is corrupt: " in caplog.messages[0], caplog.messages
        checkpoints.close()
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("how", ["empty", "renamed", "linked", "item"])
def test_a_folder_that_is_no_checkpoint_of_its_step_is_not_used(how: str, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, kept = copy / "runs/r/checkpoints", 6
    if how == "empty":
        (folder / "9").mkdir()
    elif how == "renamed":
        (folder / "6").rename(folder / "9")
        kept = 4
    elif how == "linked":
        (folder / "9").symlink_to(folder / "6")
    else:
        shutil.rmtree(folder / "6" / "state")
        kept = 4
    checkpoints = open_checkpoints(load(settings(copy, *SHORT, "name=r")))
    assert checkpoints.latest() == kept and len(caplog.messages) == 1
    checkpoints.close()


def test_validation_losses_that_are_damaged_cost_only_the_best(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "runs/r/checkpoints/validation_losses.json").write_text(json.dumps({"6": [1]}))
    checkpoints = open_checkpoints(load(settings(copy, *SHORT, "name=r")), read_only=True)
    assert checkpoints.latest() == 6 and checkpoints.best() is None and "validation_losses.json" in caplog.text
    checkpoints.close()


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.yaml", "checkpoints/validation_losses.json"])
@pytest.mark.parametrize("damage", ["folder", "bytes"])
def test_other_damaged_files_do_not_stop_a_run_from_being_started(file: str, damage: str, copy: Path) -> None:
    """Without the record of its end it evaluates once more."""
    path = copy / "runs/r" / file
    path.unlink()
    path.mkdir() if damage == "folder" else path.write_bytes(b"\xff\n[1]\n{}\n")
    assert main(["train", *settings(copy, *SHORT, "name=r")]) == FINISHED


# Bad steps.


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Makes the loss of some steps, and with it their gradients, NaN, infinite or large, on the device."""
    from mutransformer.training import step as module

    given = module.make_loss_and_grads

    def poisoned(program: Program) -> Callable[..., Any]:
        of = given(program)

        def loss_and_grads(params: Any, batch: Any, step: jax.Array) -> Any:
            metrics, grads = of(params, batch)
            factor = jnp.where(jnp.isin(step + 1, jnp.array(sorted(steps))), value, 1.0)
            return {name: of * factor for name, of in metrics.items()}, jax.tree.map(lambda g: g * factor, grads)

        return loss_and_grads

    def make_train_step(program: Program) -> Any:
        of = poisoned(program)

        def train_step(state: Any, batch: Any) -> Any:
            metrics, grads = of(state.params, batch, state.step)
            return module.update(program, state, metrics, grads, program.config.optim.lr)

        return jax.jit(train_step, donate_argnums=0, out_shardings=(program.state_shardings, None))

    monkeypatch.setattr("mutransformer.training.loop.make_train_step", make_train_step)


def states(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Filled with the state after each step, as the trainer has it."""
    from mutransformer.training.loop import Trainer

    seen, update = dict[int, Any](), Trainer.update

    def noted(self: Trainer) -> None:
        update(self)
        seen[self.step] = jax.tree.map(np.array, self.state)

    monkeypatch.setattr(Trainer, "update", noted)
    return seen


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=SLOW)])
def test_a_bad_step_changes_nothing_but_the_step(
    value: float, args: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {3, 4}, value)
    seen = states(monkeypatch)
    assert main(["train", *args, "bad_steps.limit=3"]) == FINISHED
    out = capsys.readouterr().out
    for step in (3, 4):
        assert f"warning: step {step} was skipped: loss {value:g}, gradient norm nan" in out.replace("norm inf", "norm nan")
        assert seen[step].step == step
        jax.tree.map(np.testing.assert_array_equal, (seen[step].params, seen[step].opt), (seen[2].params, seen[2].opt))
    assert (seen[5].params.embed != seen[2].params.embed).any() and metrics(run)[6]["train/loss"] < 6
    listed = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in listed] == [3, 4] and all(len(set(line["rows"])) == 8 for line in listed)

    capsys.readouterr()
    assert main(["inspect-data", *args, "--step", "3", "--rows", "1"]) == FINISHED
    assert f"batch 2, row 0: row {listed[0]['rows'][0]:,} of data, 32 of 32 tokens count" in capsys.readouterr().out


def test_too_many_bad_steps_in_a_row_end_the_run(
    args: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {2, 4, 5}, np.nan)
    assert main(["train", *args, "bad_steps.limit=2"]) == FAILED
    assert "error: step 5: the loss is nan; 2 steps in a row were skipped (bad_steps.limit), see" in capsys.readouterr().err
    assert not (run / "checkpoints/6").exists()


@pytest.mark.slow
def test_a_spike_is_skipped_and_a_resumed_run_skips_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs, one is stopped after the spike, forgets it with its later steps, and resumes from before it."""
    args = settings(tmp_path, "steps=60", "bad_steps.spike=8", "checkpoint.every=40", "optim.lr=0.001", "eval.every=0")
    poison(monkeypatch, {50}, 10.0)
    seen = states(monkeypatch)
    assert main(["train", *args, "name=whole"]) == FINISHED
    listed = (tmp_path / "runs/whole/bad_steps.jsonl").read_text()
    assert [json.loads(line)["step"] for line in listed.splitlines()] == [50]
    whole = dict(seen)
    shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/resumed")
    shutil.rmtree(tmp_path / "runs/resumed/checkpoints/60")
    monkeypatch.undo()
    poison(monkeypatch, {10**6}, 10.0)  # the same program, but here no step is bad: the list alone says what to skip
    again = states(monkeypatch)
    assert main(["train", *args, "name=resumed"]) == FINISHED
    jax.tree.map(np.testing.assert_array_equal, again[60], whole[60])


# Before training on, and without training.


def test_a_restored_state_that_scores_differently_is_told(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As restored into another dtype, which Orbax does without a word."""
    args = settings(copy, *SHORT, "name=r", "steps=7", "checkpoint.allow=[steps]")
    given = Checkpoints.restore

    def damaged(self: Checkpoints, step: int, shapes: Any) -> Any:
        state, position = given(self, step, shapes)
        return dataclasses.replace(state, params=jax.tree.map(lambda a: a * 0.5, state.params)), position

    monkeypatch.setattr(Checkpoints, "restore", damaged)
    assert main(["train", *args]) == FINISHED
    assert "the restored state differs from the saved one: its loss on the first validation batch is" in caplog.text
    shutil.rmtree(copy / "runs/r/checkpoints/7")
    caplog.clear()
    monkeypatch.undo()
    assert main(["train", *args]) == FINISHED and "the restored state" not in caplog.text


@pytest.mark.parametrize("damage", [None, "checkpoint", "data", "lock"])
def test_doctor_gives_a_verdict_on_each_need(damage: str | None, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, run = settings(copy, *SHORT, "name=r"), copy / "runs/r"
    if damage == "checkpoint":
        flip(run / "checkpoints/4/sha256.json")
    if damage == "data":
        args.append(f"data.files=[{copy}/none.txt]")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with RunFolder(run).owned() if damage == "lock" else contextlib.nullcontext():
        code = main(["doctor", *args, "checkpoint.allow=[data.files]", f"data.cache_dir={copy}/cache"])
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split(":")[0] for line in lines if line.startswith("FAIL")]
    expected = {"checkpoint": "checkpoints", "data": "data", "lock": "folder"}.get(damage or "")
    assert failed == ([f"FAIL  {expected}"] if expected else []) and code == (FAILED if expected else FINISHED), lines
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# A run that was moved.


@pytest.mark.parametrize("given", ["folder", "config", "within", "equals", "relative", "above", "link to the config"])
def test_a_run_is_where_it_lies(given: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = copy / ("lr=0.1 moved" if given == "equals" else "moved")
    (copy / "runs/r").rename(moved)
    (copy / "mine.yaml").symlink_to(moved / "config.yaml")
    monkeypatch.chdir({"within": moved, "above": moved / "checkpoints"}.get(given, copy))
    args = {"config": f"{moved}/config.yaml", "within": "config.yaml", "above": "..", "link to the config": f"{copy}/mine.yaml"}
    arg = args.get(given, str(moved))
    if given == "relative":
        assert load(["./moved/"]).rundir.resolve() == moved and load(["moved", "name=other"]).rundir.resolve() == copy / "other"
        return
    assert load([arg]).rundir == moved and load([arg]).optim.warmup_steps == 3
    assert load([arg, "name=other"]).rundir == copy / "other"


@pytest.mark.parametrize("there", [True, False])
def test_a_tokenizer_in_the_folder_of_a_run_moves_with_it(there: bool, tmp_path: Path) -> None:
    (run := tmp_path / "before/r").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    text = f"name: r\nworkdir: {run.parent}\ndata: {{tokenizer: sentencepiece, tokenizer_file: {run}/tokenizer.model}}\n"
    (run / "config.yaml").write_text(text)
    (run / "tokenizer.model").write_bytes(b"x" * there)
    assert load([str(run)]).data.tokenizer_file == f"{run}/tokenizer.model"
    run.rename(moved := tmp_path / "after")
    if not there:
        (moved / "tokenizer.model").unlink()
    assert load([str(moved)]).data.tokenizer_file == (f"{moved}/tokenizer.model" if there else f"{run}/tokenizer.model")
