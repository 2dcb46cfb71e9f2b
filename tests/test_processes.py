"""Several processes are one with all their devices: the same global batches exactly, the same losses to float error."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
from short_runs import finish, free_port, metrics, settings, start, wait_for_step

from mutransformer.errors import STUCK
from mutransformer.training.layer_sizes import QUANTITIES
from mutransformer.training.sinks import layer_tags, read_layers

LENGTH = ["steps=6", "eval.every=3", "precision.compute=float32"]
MESHES = {"4x2": ["mesh.x=4", "mesh.y=2"], "1x8": ["mesh.x=1", "mesh.y=8", "model.d_head=8"]}


def run(script: str, args: list[str], n_process: int) -> None:
    shared = [f"distributed.coordinator=127.0.0.1:{free_port()}", f"distributed.n_process={n_process}"]
    of = [[*args, *(shared if n_process > 1 else []), f"distributed.process_id={i}"] for i in range(n_process)]
    started = [start(script, each, 8 // n_process, quick=True) for each in (of if n_process > 1 else [args])]
    for process in started:
        finish(process)


@pytest.mark.slow
def test_four_processes_with_what_makes_a_step_fast_are_one_of_eight_devices(tmp_path: Path) -> None:
    """Four of two devices each, with streams, exchanges, kept activations and two slices; and one that has none of that."""
    args = [*settings(tmp_path, *LENGTH), "data.batch_size=16"]
    fast = [
        "mesh.replicas=2",
        "mesh.x=2",
        "mesh.y=2",
        "mesh.overlap_groups=2",
        "mesh.reduce_scatter_via_all_to_all=true",
        "model.remat=dots",
    ]
    run("scripts/train.py", [*args, "mesh.x=8", "mesh.y=1", "name=plain"], 1)
    run("scripts/train.py", [*args, *fast, "name=fast"], 4)
    plain, fast_ones = (metrics(tmp_path / "runs" / name) for name in ("plain", "fast"))
    assert list(plain) == list(fast_ones) == list(range(1, 7))
    for step, line in plain.items():
        for tag in {"train/loss", "norm/gradient", "validation/loss", "validation_whole/loss"} & set(line):
            assert fast_ones[step][tag] == pytest.approx(line[tag], rel=1e-5), f"{tag} at step {step}"


@pytest.mark.parametrize("mesh", ["4x2", pytest.param("1x8", marks=pytest.mark.slow)])
def test_same_losses(tmp_path: Path, mesh: str) -> None:
    args = settings(tmp_path, *LENGTH, *MESHES[mesh])
    for n_process in (1, 2):
        run("scripts/train.py", [*args, f"name=of{n_process}"], n_process)
    one, two = (metrics(tmp_path / "runs" / f"of{n}") for n in (1, 2))
    assert list(one) == list(two) == list(range(1, 7))
    for step, line in one.items():
        for tag in {"train/loss", "norm/gradient", "validation/loss", "validation_whole/loss"} & set(line):
            assert two[step][tag] == pytest.approx(line[tag], rel=1e-5), f"{tag} at step {step}"
    assert one[6]["validation_whole/loss"] != one[6]["train/loss"]


@pytest.mark.slow
def test_the_layers_of_two_processes_are_as_large_as_those_of_one(tmp_path: Path) -> None:
    args = settings(tmp_path, *LENGTH, *MESHES["4x2"], "log.layers=2")
    for n_process in (1, 2):
        run("scripts/train.py", [*args, f"name=of{n_process}"], n_process)
    one, two = (read_layers(tmp_path / "runs" / f"of{n}") for n in (1, 2))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [2, 4, 6]
    for ours, theirs in zip(one, two, strict=True):
        of_one, of_two = (layer_tags({quantity: row[quantity] for quantity in QUANTITIES}) for row in (ours, theirs))
        assert of_two == pytest.approx(of_one, rel=1e-3)


def global_batches(tmp_path: Path, order: str, args: list[str], n_process: int) -> list[str]:
    """The hashes that each process writes of the batches that it sees.

    Args:
        order: of the devices in the mesh, a digit each.
    """
    folder = tmp_path / f"of{n_process}"
    folder.mkdir()
    run("tests/global_batches.py", [str(folder), order, *args], n_process)
    return [(folder / f"process{i}").read_text() for i in range(n_process)]


@pytest.mark.parametrize(
    ("mesh", "order", "n_process"),
    [
        pytest.param("8x1", "01234567", 2, marks=pytest.mark.slow),
        ("1x8", "01234567", 2),
        pytest.param("8x1", "04152637", 4, marks=pytest.mark.slow),  # each process holds two rows that are not neighbours
        pytest.param("4x2", "04152637", 4, marks=pytest.mark.slow),  # and here every row is of two processes
    ],
)
def test_same_global_batches(tmp_path: Path, mesh: str, order: str, n_process: int) -> None:
    x, y = mesh.split("x")
    args = settings(tmp_path, f"mesh.x={x}", f"mesh.y={y}")
    (one,) = global_batches(tmp_path, order, args, 1)
    assert len(set(one.splitlines())) == 50, "batches repeat: nothing is shown"
    assert global_batches(tmp_path, order, args, n_process) == [one] * n_process


@pytest.mark.slow
def test_four_processes_draw_the_batches_of_one_from_three_sources_with_documents_apart(tmp_path: Path) -> None:
    sources = []
    for name, weight in {"code": 0.5, "books": 0.3, "web": 0.2}.items():
        (file := tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}: {i * i % 97}" for i in range(600)))
        sources.append(f"{name}: {{source: text, files: [{file}], weight: {weight}}}")
    args = [arg for arg in settings(tmp_path) if not arg.startswith(("data.source=", "data.files="))]
    args += [f"data.sources={{{', '.join(sources)}}}", "data.intra_document_mask=true", "mesh.x=8", "mesh.y=1"]
    (one,) = global_batches(tmp_path, "01234567", args, 1)
    assert len(set(one.splitlines())) == 50 and one.count("(8, 32)") == 150, "batches repeat, or have no segments"
    assert global_batches(tmp_path, "01234567", args, 4) == [one] * 4


def separate(tmp_path: Path, *of: str) -> list[list[str]]:
    """Settings of two processes of a run, each with a text file and a cache of its own."""
    shared = [f"distributed.coordinator=127.0.0.1:{free_port()}", "distributed.n_process=2"]
    return [
        [*settings(tmp_path / f"host{i}", *LENGTH, "mesh.x=2", "mesh.y=1", *of, *shared, f"workdir={tmp_path}/runs")]
        + ["data.cache_is_shared=false", f"distributed.process_id={i}"]
        for i in range(2)
    ]


def test_processes_with_different_texts_are_told(tmp_path: Path) -> None:
    given = separate(tmp_path, "name=apart")
    (other := tmp_path / "host1/text.txt").write_text(other.read_text().replace("is", "was"))
    for process in [start("scripts/train.py", args, quick=True) for args in given]:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 2, f"{out}\n{err}"
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: data differs between process 0 and 1: train, validation, test (process 0 has train ")
        assert "Traceback" not in err


@pytest.mark.slow
def test_cold_caches_of_their_own_train_as_one_that_is_shared(tmp_path: Path) -> None:
    for name in ("first", "second"):  # the second finds both caches warm
        for process in [start("scripts/train.py", args, quick=True) for args in separate(tmp_path, f"name={name}")]:
            finish(process)
    cold, warm = (metrics(tmp_path / "runs" / name) for name in ("first", "second"))
    assert list(cold) == list(range(1, 7))
    assert [line["train/loss"] for line in cold.values()] == [line["train/loss"] for line in warm.values()]
    assert len(list(tmp_path.glob("host*/cache/tokens-*/manifest.json"))) == 2


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    shared = [f"distributed.coordinator=127.0.0.1:{free_port()}", "distributed.n_process=2"]
    args = [*settings(tmp_path, "steps=100000", "eval.every=0", "name=asked"), *shared]
    started = [start("scripts/train.py", [*args, f"distributed.process_id={i}"], devices=2, quick=True) for i in range(2)]
    wait_for_step(started[0], tmp_path / "runs" / "asked", 3)
    started[1].send_signal(signal.SIGTERM)
    outputs = [finish(process, expect=75) for process in started]
    last = max(metrics(tmp_path / "runs" / "asked"))
    assert f"Stopped at step {last}; checkpoint saved." in outputs[0]
    assert (tmp_path / "runs" / "asked" / "checkpoints" / str(last)).is_dir()


def two(tmp_path: Path, *of: str) -> list[list[str]]:
    """Settings of two processes of a run named r, which would train for ever."""
    shared = [f"distributed.coordinator=127.0.0.1:{free_port()}", "distributed.n_process=2", "name=r", "eval.every=0"]
    given = [*settings(tmp_path, "steps=100000"), *shared, *of]
    return [[*given, f"distributed.process_id={i}"] for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_gone_is_named_in_one_line_within_half_a_minute(number: signal.Signals, tmp_path: Path) -> None:
    first, second = [start("scripts/train.py", args, quick=True) for args in two(tmp_path)]
    wait_for_step(first, tmp_path / "runs/r", 5)
    second.send_signal(number)
    began = time.monotonic()
    try:
        _, err = first.communicate(timeout=60)
        assert time.monotonic() - began < 30 and first.returncode == STUCK
        (line,) = [line for line in err.splitlines() if not line.startswith("[Gloo]")]
        assert re.fullmatch(r"error: process 1 on host \S+, which was .* step \d+, has given no sign for 2\d s: .*", line), line
    finally:
        second.kill()
        second.communicate()


SLEEPER = """
import sys, time
from mutransformer.cli import main
from mutransformer.data.batches.pipeline import Batches
given = Batches.__next__
def sleep(self):
    if self.get_state()["next_index"] == 5 and {who!r} in sys.argv[-1]:
        time.sleep(1e6)
    return given(self)
Batches.__next__ = sleep
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_process", [1, 2])
def test_a_process_that_is_stuck_ends_the_run_with_its_stacks(n_process: int, tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER.format(who=f"process_id={n_process - 1}"))
    of = two(tmp_path, "watchdog.timeout=5")
    args = of if n_process == 2 else [[arg for arg in of[0] if "distributed" not in arg] + ["distributed.process_id=0"]]
    started = [start(str(script), each, quick=True) for each in args]
    errors = []
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == STUCK, err
        errors.append([line for line in err.splitlines() if line.startswith("error: ")][-1])
    late = n_process - 1
    assert f"error: process {late} has been waiting for the batch of step 6 for 5 s; the stacks of its threads" in errors[-1]
    if n_process == 2:
        assert re.search(r"It waits for process 1 on host \S+, which was waiting for the batch of step 6; the same", errors[0])
    (stacks,) = (tmp_path / "runs/r").glob(f"stacks-{late}-*.txt")
    assert "in sleep" in stacks.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("of", [["optim.lr=0.5"], ["seed=9"], ["model.n_layer=3"], ["eval.every=2"]])
def test_processes_with_different_settings_are_told(of: list[str], tmp_path: Path) -> None:
    given = two(tmp_path)
    key, value = of[0].split("=")
    for process in [start("scripts/train.py", args, quick=True) for args in (given[0], [*given[1], *of])]:
        _, err = process.communicate(timeout=100)
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and line.startswith(f"error: the configuration differs between process 0 and 1: {key} ")
        assert f"process 1 {value}" in line and not metrics(tmp_path / "runs/r")


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    given = two(tmp_path)
    for process in [start("scripts/train.py", [*args, f"workdir={tmp_path}/{i}"], quick=True) for i, args in enumerate(given)]:
        _, err = process.communicate(timeout=100)
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and line.startswith(
            "error: workdir: the folder of the run, which must be on a file system"
        )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_any_signal_to_one_process_stops_both_at_the_same_step(number: signal.Signals, tmp_path: Path) -> None:
    started = [start("scripts/train.py", args, quick=True) for args in two(tmp_path)]
    wait_for_step(started[0], tmp_path / "runs/r", 3)
    started[1].send_signal(number)
    outputs = [finish(process, expect=75) for process in started]
    last = max(metrics(tmp_path / "runs/r"))
    assert f"Stopped at step {last}; checkpoint saved." in outputs[0]


@pytest.mark.slow
def test_a_run_that_was_suspended_goes_on(tmp_path: Path) -> None:
    """Ctrl-Z for longer than the watchdog allows a step to take."""
    (args, _), run = two(tmp_path, "watchdog.timeout=7", "watchdog.start_timeout=60"), tmp_path / "runs/r"
    process = start("scripts/train.py", [arg for arg in args if "distributed" not in arg], quick=True)
    wait_for_step(process, run, 5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(12)
    process.send_signal(signal.SIGCONT)
    wait_for_step(process, run, max(metrics(run)) + 50)
    process.send_signal(signal.SIGTERM)
    finish(process, expect=75)


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_other(tmp_path: Path) -> None:
    """Only process 0 has the folder, and sees that it is gone when it is to save."""
    started = [start("scripts/train.py", args, quick=True) for args in two(tmp_path, "checkpoint.every=20")]
    wait_for_step(started[0], run := tmp_path / "runs/r", 5)
    run.rename(tmp_path / "gone")
    began, (first, second) = time.monotonic(), started
    _, err = second.communicate(timeout=100)
    assert second.returncode == STUCK and time.monotonic() - began < 40, err
    assert re.search(r"error: process 0 failed: .*/runs/r: the folder was removed or replaced while the run was", err), err
    _, err = first.communicate(timeout=100)
    assert re.search(r"error: .*/runs/r: the folder was removed or replaced", err), err


POISONED = """
import sys
import jax.numpy as jnp
from mutransformer.cli import main
from mutransformer.model.transformer import Forward
from mutransformer.training import loop
loss, put_batch, n_put = Forward.loss, loop.put_batch, 0
def poisoned_loss(self, params, tokens, *of):
    factor = jnp.where(jnp.any(tokens == 300), jnp.nan, 1.0)
    return tuple(value * factor for value in loss(self, params, tokens, *of))
def put(batch, mesh):
    global n_put
    n_put += 1
    if n_put in (3, 4) and {who!r} in sys.argv[-1]:
        batch.tokens[0, 0] = 300  # no byte
    return put_batch(batch, mesh)
Forward.loss, loop.put_batch = poisoned_loss, put
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10, 2])
def test_nan_in_one_process_is_skipped_by_all_or_ends_all(limit: int, tmp_path: Path) -> None:
    """Rows of process 1 alone make the loss of steps 3 and 4 NaN. Both skip them, or both end after the second."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(who="process_id=1"))
    started = [start(str(script), args, quick=True) for args in two(tmp_path, "steps=6", f"bad_steps.limit={limit}")]
    outputs = [process.communicate(timeout=200) for process in started]
    run = tmp_path / "runs/r"
    listed = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in listed] == [3, 4] and {line["loss"] for line in listed} == {"nan"}
    if limit == 10:
        assert [process.returncode for process in started] == [0, 0], outputs
        assert metrics(run)[6]["train/loss"] < metrics(run)[1]["train/loss"] and "skipped" in outputs[0][0]
    else:
        assert [process.returncode for process in started] == [1, 1], outputs
        errors = ["error: step 4: the loss is nan; 2 steps in a row were skipped" in err for _, err in outputs]
        assert errors == [True, True], outputs
