"""A run that was killed and started again is the run that was not: every later loss, weight and moment is equal bit for bit."""

import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import program
from short_runs import events, finish, kill_at_random, metrics, settings, start, wait_for_step

from mutransformer.config.load import load
from mutransformer.errors import FINISHED, STOPPED
from mutransformer.sharding.stopping import StopRequest
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.checkpoint_storage import CHECKSUMS
from mutransformer.training.loop import train
from mutransformer.training.program import TrainState, build_with_data
from mutransformer.training.run_folder import RunFolder

# An epoch is some 40 batches: the run goes through more than one, and is killed within one.
LENGTH = ["steps=60", "checkpoint.every=7", "eval.every=20"]
# With multipliers on everything, forward too: what is read back must not be scaled again.
LENGTH += ["optim.rule=completep", "model.n_layer_base=1"]
TRAIN = "scripts/train.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    finish(start(TRAIN, settings(folder, *LENGTH, "name=whole"), quick=True))
    return folder / "runs" / "whole"


def final_state(run: Path) -> TrainState:
    config = load([str(run / "config.yaml")])
    checkpoints = Checkpoints(config, RunFolder(config.rundir), read_only=True)
    step = checkpoints.latest()
    assert step is not None and step == config.steps
    state, position = checkpoints.restore(step, program(config, jax.devices()[:1]).state)
    assert position == {"next_index": config.steps}
    return state


def compare(run: Path, whole: Path) -> None:
    ours, theirs = metrics(run), metrics(whole)
    assert list(ours) == list(theirs) == list(range(1, 61))
    tags = {tag for tag in theirs[60] if not tag.startswith(("speed/", "memory/", "time"))}
    assert {"train/loss", "norm/update", "validation/loss", "validation_whole/loss"} <= tags
    for step, line in theirs.items():
        same = {tag for tag in tags & set(line) if line[tag] == ours[step].get(tag)}
        assert same == tags & set(line), f"step {step}"
    jax.tree.map(np.testing.assert_array_equal, final_state(run), final_state(whole))


# Between checkpoints, in the second epoch; and in the first as well.
@pytest.mark.parametrize("steps", [(44,), pytest.param((17, 44), marks=pytest.mark.slow)])
def test_killed_run_goes_on_bit_for_bit(steps: tuple[int, ...], folder: Path, uninterrupted: Path) -> None:
    args = settings(folder, *LENGTH, f"name=killed{len(steps)}")
    run = folder / "runs" / f"killed{len(steps)}"
    for step in steps:
        process = start(TRAIN, args, quick=True)
        wait_for_step(process, run, step)
        process.send_signal(signal.SIGKILL)
        finish(process, expect=-signal.SIGKILL)
    out = finish(start(TRAIN, args, quick=True))
    assert "resumes after step" in out
    compare(run, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_the_step_and_says_so(folder: Path, uninterrupted: Path) -> None:
    args = settings(folder, *LENGTH, "name=asked")
    run = folder / "runs" / "asked"
    process = start(TRAIN, args, quick=True)
    wait_for_step(process, run, 10)
    process.send_signal(signal.SIGTERM)
    out = finish(process, expect=75)
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert f"Stopped at step {saved}; checkpoint saved" in out and saved >= 10
    out = finish(start(TRAIN, args, quick=True))
    assert f"resumes after step {saved}" in out
    compare(run, uninterrupted)


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_it_goes_on(folder: Path, uninterrupted: Path) -> None:
    run = folder / "runs" / "flipped"
    shutil.copytree(uninterrupted, run)
    files = [path for path in (run / "checkpoints" / "60").rglob("*") if path.is_file() and path.name != CHECKSUMS]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    out = finish(start(TRAIN, settings(folder, *LENGTH, "name=flipped"), quick=True))
    assert "60 is corrupt" in out and "resumes after step 56" in out
    compare(run, uninterrupted)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(folder: Path, uninterrupted: Path) -> None:
    """With a checkpoint at every second step, some of them within a save. TensorBoard has each step once, none is missing."""
    args, run = settings(folder, *LENGTH, "checkpoint.every=2", "name=often"), folder / "runs" / "often"
    saving = run / "checkpoints"
    kills, within_a_save = kill_at_random(args, run, 59, lambda: any(saving.glob("*.orbax-checkpoint-tmp*")))
    assert kills >= 15 and within_a_save >= 2, f"{kills} kills, {within_a_save} within a save"
    finish(start(TRAIN, args, quick=True))
    compare(run, uninterrupted)
    found = [(tag, step) for tag, step, _ in events(run)]
    assert len(found) == len(set(found)) and {step for _, step in found} == set(range(1, 61))
    assert not list((run / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    """8 x 1, then 4 x 2, then 2 x 4 devices, float32: the losses of one run on 8 x 1, but for float error."""
    args = settings(tmp_path, "steps=9", "precision.compute=float32", "data.batch_size=8", "eval.every=3", "checkpoint.every=0")

    def run(name: str, x: int, y: int, until: int) -> dict[int, dict[str, float]]:
        stop = StopRequest()
        stop.agree = lambda _: max(metrics(tmp_path / "runs" / name), default=0) >= until - 1  # the last one is not yet read
        config = load([*args, f"name={name}", f"mesh.x={x}", f"mesh.y={y}"])
        assert train(*build_with_data(config), stop) == (FINISHED if until > 9 else STOPPED)
        return metrics(tmp_path / "runs" / name)

    whole = run("whole", 8, 1, 99)
    for x, y, until in ((8, 1, 3), (4, 2, 6), (2, 4, 99)):
        parts = run("parts", x, y, until)
    assert list(parts) == list(whole) == list(range(1, 10))
    for step, line in whole.items():
        for tag in {"train/loss", "norm/gradient", "validation/loss"} & set(line):
            assert parts[step][tag] == pytest.approx(line[tag], rel=1e-5), f"{tag} at step {step}"
