"""Sections of a hardware report that need no JAX, for tests of what runs them in processes of their own."""

import os
import signal
import time
from collections.abc import Iterator

from mutransformer.study.hardware.report import Section
from mutransformer.study.hardware.section import Result, Task
from mutransformer.study.hardware.sizes import Sizes

DEVICE_OF_TESTS = {
    "platform": "cpu",
    "kind": "cpu",
    "count": 1,
    "memory_bytes": 8e9,
    "peak_flops": None,
    "compute": "float32",
    "cpu": {"cores": 2, "widest_instructions": "avx2", "machine": "x86_64", "load_average": 1.9},
    "python": "3.11.7",
    "system": "Linux",
    "versions": {"jax": "0.10.2"},
    "environment": {},
    "name": "cpu-2-core-avx2-jax-0.10.2",
}


def describe(task: Task) -> Iterator[Result]:
    yield DEVICE_OF_TESTS


def good(task: Task, value: int) -> Iterator[Result]:
    task.say("working")
    (task.folder / "by_good.txt").write_text(str(value))
    yield {"value": value}


def failing(task: Task, value: int) -> Iterator[Result]:
    yield {"value": value}
    raise OSError(f"no such file: {__file__}\nand more")


def killed(task: Task, value: int) -> Iterator[Result]:
    yield {"value": value}
    os.kill(os.getpid(), signal.SIGKILL)


def slow(task: Task, value: int) -> Iterator[Result]:
    yield {"value": value}
    time.sleep(600)


def _seven(sizes: Sizes) -> tuple[int]:
    return (7,)


SECTIONS = {each: Section(each, "a test", __name__, each, _seven, "none") for each in ("good", "failing", "killed", "slow")}
DEVICE = Section("device", "a test", __name__, "describe", lambda sizes: (), "none")
