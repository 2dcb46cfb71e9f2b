"""Runs of the real program as processes of their own: what a user does, small enough for a test."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from compiling import xla_flags

from mutransformer.errors import USAGE_ERROR
from mutransformer.sharding import processes

ROOT = Path(__file__).parent.parent
TINY = [
    "model.d_model=64",
    "model.d_head=16",
    "model.n_layer=2",
    "model.n_vocab=384",
    "data.source=text",
    "data.tokenizer=bytes",
    "data.seq_len=32",
    "data.batch_size=8",
    "optim.warmup_steps=3",
    "eval.batches=2",
    "eval.samples=0",
    "log.every=1",
]


def settings(folder: Path, *more: str) -> list[str]:
    """TINY on text of its own, all below one folder."""
    text = folder / "text.txt"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(f"{i}: the {i * i} of {i} is {i * i % 97}" for i in range(400)), encoding="utf-8")
    return [*TINY, f"data.files=[{text}]", f"data.cache_dir={folder / 'cache'}", f"workdir={folder / 'runs'}", *more]


def start(script: str, args: list[str], devices: int = 1, quick: bool = False) -> subprocess.Popen[str]:
    """Starts a script on simulated CPU devices; quick: see tests/compiling.py."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices, quick)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, ROOT / script, *args], env=env, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str], expect: int = 0) -> str:
    """Waits, checks the exit code, and gives what was printed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == expect, f"exit code {process.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """metrics.jsonl by step; what is written only half at the moment is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line for line in whole}


def events(run: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every number in TensorBoard's files, read without what TensorBoard forgets of them."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted(run.glob("events*"))
    found = [event for file in files for event in EventFileLoader(str(file)).Load()]
    numbers = [(event.step, value) for event in found for value in event.summary.value if value.HasField("tensor")]
    return [(value.tag, step, value.tensor.float_val[0]) for step, value in numbers if len(value.tensor.float_val)]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Returns once a running process has logged a step."""
    deadline = time.monotonic() + 120
    while max(metrics(run), default=0) < step:
        assert process.poll() is None, f"ended before step {step}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no step {step} within two minutes"
        time.sleep(0.01)


def kill_at_random(args: list[str], run: Path, last: int, saving: Callable[[], bool]) -> tuple[int, int]:
    """Kills a run of scripts/train.py, which is started again and again, up to 20 times: none to three steps after its last one.

    last: the latest step to wait for. saving: whether a save was cut off. Returns the kills, and how many of them cut off a save.
    """
    random, kills, within_a_save = Random(0), 0, 0
    while kills < 20:
        process = start("scripts/train.py", args, quick=True)
        before = max(metrics(run), default=0)
        wait_for_step(process, run, min(before + random.choice([0, 1, 2, 3]), last))
        time.sleep(random.uniform(0, 0.1))
        if process.poll() is not None:
            break  # it came to its end
        process.kill()
        process.communicate()
        kills += 1
        within_a_save += saving()
    return kills, within_a_save


def refuse_before_jax(run: Callable[[], int], message: str, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    """Checks that a command tells of a mistake in one line, exit code 2, before JAX starts, and leaves nothing in the folder."""

    def started(*_: object) -> None:
        raise AssertionError("JAX was started")

    for name in ("prepare_jax", "simulate_devices"):
        monkeypatch.setattr(processes, name, started)
    monkeypatch.chdir(folder)
    assert run() == USAGE_ERROR
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: .*\n", err) and re.search(message, err), err
    assert not out and not list(folder.iterdir())
