"""Worker processes: they end with their parent, close() ends stopped ones, and Ctrl-C makes none of them print."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]

# Reads batches ahead in two worker processes. It prints "ready" and closes them when a line arrives on standard input.
READ = """
import sys, time
from mutransformer.config.data import DataConfig
from mutransformer.data.batches.pipeline import train_batches
from mutransformer.data.cache.prepare import prepare
if __name__ == "__main__":
    folder, size = sys.argv[1], int(sys.argv[2])
    config = DataConfig(source="text", files=[folder + "/text.txt"], cache_dir=folder + "/cache", tokenizer="bytes",
                        workers=2, seq_len=size, batch_size=4)
    batches = train_batches(prepare(config).splits["train"], config, 0, 1, (0,), 259)
    print("starting", flush=True)
    try:
        for _ in range(5):
            next(batches)
        print("ready", flush=True)
        sys.stdin.readline()
    finally:
        start = time.monotonic()
        batches.close()
        print(time.monotonic() - start, flush=True)
"""

# Tokenizes in two processes, with a tokenizer that never comes to an end.
TOKENIZE = """
import sys, time
from mutransformer.cli import run_cli
from mutransformer.config.data import DataConfig
from mutransformer.data.cache import build
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer

class Slow(ByteTokenizer):
    def encode(self, texts, threads=1):
        time.sleep(0.01)
        print("ready", flush=True)
        time.sleep(600)

if __name__ == "__main__":
    folder = sys.argv[1]
    build._IN_PROCESS = 0
    from mutransformer.data.cache import prepare as module
    module.open_tokenizer = lambda *_: Slow()
    config = DataConfig(source="jsonl", files=[folder + "/*.jsonl"], cache_dir=folder + "/cache", tokenizer="bytes",
                        tokenize_workers=2)
    print("starting", flush=True)
    sys.exit(run_cli(lambda: prepare(config) and 0))
"""

SCRIPTS = [pytest.param(READ, id="read", marks=pytest.mark.slow), pytest.param(TOKENIZE, id="tokenize")]


@pytest.fixture
def start(tmp_path: Path):
    """Starts a script in a session of its own; what is left of it is killed."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of the text, number {i * i}\n" for i in range(20_000)))
    for i in range(2):
        (tmp_path / f"{i}.jsonl").write_text('{"text": "a text"}\n' * 40)
    started: list[subprocess.Popen[str]] = []

    def call(script: str, *args: str) -> subprocess.Popen[str]:
        (tmp_path / "script.py").write_text(script)
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), *args]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True)
        )
        return started[-1]

    yield call
    for process in started:
        for pid in [*workers(process), process.pid]:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Processes of the session that carry out Python's spawn, without multiprocessing's own tracker."""
    found = []
    for other in psutil.process_iter():
        try:
            if other.pid != process.pid and os.getsid(other.pid) == process.pid and "spawn_main" in " ".join(other.cmdline()):
                found.append(other.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(f"ended before {line}: {process.stderr and process.stderr.read()[-2000:]}")


def stop(pid: int) -> None:
    """Returns once all threads are stopped: to the system the process is so only then, some time after the signal."""
    os.kill(pid, signal.SIGSTOP)
    threads = [Path(f"/proc/{pid}/task/{thread.id}/stat") for thread in psutil.Process(pid).threads()]
    assert wait_for(lambda: all(path.read_text().rpartition(")")[2].split()[0] == "T" for path in threads), 10), "not stopped"


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("stopped", [False, True])
def test_workers_end_with_a_parent_that_is_killed(script: str, stopped: bool, start) -> None:
    process = start(script, "64")
    until(process, "ready")
    assert wait_for(lambda: [os.getpgid(pid) == pid for pid in workers(process)] == [True, True], 20), "not set up"
    if stopped:
        stop(workers(process)[0])
    process.kill()
    process.wait()
    assert wait_for(lambda: not workers(process), 5)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 2.0])
def test_workers_that_still_start_end_with_a_parent_that_is_killed(script: str, seconds: float, start) -> None:
    process = start(script, "64")
    until(process, "starting")
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert wait_for(lambda: not workers(process), 20)


@pytest.mark.parametrize("size", ["64", pytest.param("4096", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stopped", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_close_ends_stopped_workers(size: str, stopped: int, start) -> None:
    process = start(READ, size)
    until(process, "ready")
    assert wait_for(lambda: len(workers(process)) == 2, 20)
    time.sleep(0.5)  # until they wait with full buffers, perhaps in the middle of sending
    for pid in workers(process)[:stopped]:
        stop(pid)
    out, err = process.communicate("close\n", timeout=30)
    assert process.returncode == 0 and "Traceback" not in err
    assert float(out.split()[-1]) < (9 if stopped else 3)
    assert not workers(process)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", [pytest.param("starting", marks=pytest.mark.slow), "ready"])
def test_signals_to_the_group_print_nothing_from_workers(script: str, number: int, when: str, start) -> None:
    process = start(script, "64")
    until(process, when)
    if when == "starting":
        time.sleep(0.7)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert "spawn" not in err and "Process " not in err
    assert err.count("Traceback") <= (script == READ and number == signal.SIGINT)  # the script's own
    assert script == READ or number == signal.SIGTERM or err.endswith("error: interrupted\n")
    assert wait_for(lambda: not workers(process), 10)
