"""Tokenizing to a cache: killed at any moment, by several processes, on a full disk, in a folder or an object store."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from object_store import install
from short_runs import free_port
from test_sources import TEXTS, write

from mutransformer.config.data import DataConfig
from mutransformer.data.cache import build
from mutransformer.data.cache.prepare import prepare
from mutransformer.data.cache.store import Corrupt, Store
from mutransformer.data.sources.registry import ATTEMPTS
from mutransformer.errors import ConfigError
from mutransformer.sharding.processes import Processes

ROOT = Path(__file__).parents[1]
FILES = 12

# A process of a run: its barrier waits for files, up to a limit.
PROCESS = """
import json, sys, time
from pathlib import Path
from mutransformer.config.load import load
from mutransformer.data.cache import build
from mutransformer.data.cache.prepare import prepare
from mutransformer.sharding.processes import Processes
if __name__ == "__main__":
    n, i, folder, *args = sys.argv[1:]
    tokenize, made, met = build.tokenize_shard, [], []

    def barrier(name):
        met.append(name)
        until = time.monotonic() + 60
        (Path(folder) / f"{len(met)} {i}").touch()
        while len(list(Path(folder).glob(f"{len(met)} *"))) < int(n):
            assert time.monotonic() < until, f"nobody comes to {name}"
            time.sleep(0.01)

    build.tokenize_shard = lambda target, shard, index, threads: (made.append(index), tokenize(target, shard, index, threads))[1]
    text = prepare(load(args).data, Processes(int(n), int(i), barrier)).splits["train"]
    print(json.dumps({"made": made, "tokens": text.fingerprint, "barriers": len(met)}))
"""


@pytest.fixture(params=["folder", "objects"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the cache: a local folder, or an object store, for this process and those that it starts."""
    if request.param == "folder":
        return str(tmp_path / "cache")
    for key, value in install(tmp_path / "store").items():
        monkeypatch.setenv(key, value)
    return "objects://bucket/cache"


def objects(root: str, tmp_path: Path) -> dict[str, bytes]:
    """What lies in the cache, by name. An upload to the stand-in that was cut off is a hidden file, and no object."""
    remote = "://" in root
    folder = tmp_path / ("store/objects/bucket/cache" if remote else "cache")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not (remote and path.name.startswith("."))}


def arguments(tmp_path: Path, root: str, *more: str) -> list[str]:
    files = f"data.files=[{tmp_path}/text/*.jsonl*]"
    local = f"data.local_dir={tmp_path}/local"
    return ["data.source=jsonl", files, "data.tokenizer=bytes", f"data.cache_dir={root}", local, *more]


def text(tmp_path: Path, copies: int = 1, kind: str = "jsonl.gz") -> None:
    for i in range(FILES):
        write(tmp_path / f"text/{i:02d}.{kind}", [f"{i} {k} {one}" for k in range(copies) for one in TEXTS[i::FILES]])


def start(script: str, args: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, *script.split("\0"), *args]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def prepare_data(args: list[str]) -> subprocess.Popen[str]:
    return start(str(ROOT / "scripts/prepare_data.py"), args)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err[-3000:]
    return out if code == 0 else err


def of_session(session: int) -> list[int]:
    """Processes that a process started, and that still run."""
    return [p.pid for p in psutil.process_iter() if p.pid != session and _session(p.pid) == session]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def test_a_folder_and_an_object_store_come_to_the_same(root: str, tmp_path: Path) -> None:
    text(tmp_path)
    one = prepare(DataConfig(**config(tmp_path, root))).splits["train"]
    plain = prepare(DataConfig(**config(tmp_path, str(tmp_path / "other")))).splits["train"]
    assert one.fingerprint == plain.fingerprint and len(one.sources[0].sections) == FILES
    here = objects(root, tmp_path)
    assert {name.partition("/")[2]: data for name, data in here.items()} == {
        path.name: path.read_bytes() for path in (tmp_path / "other").glob("tokens-*/*")
    }
    assert len(here) == 2 * FILES + 1


def config(tmp_path: Path, root: str, **more: Any) -> dict[str, Any]:
    files = [f"{tmp_path}/text/*.jsonl*"]
    given: dict[str, Any] = {
        "source": "jsonl",
        "files": files,
        "tokenizer": "bytes",
        "cache_dir": root,
        "local_dir": f"{tmp_path}/local",
    }
    return given | more


def test_copies_of_remote_shards_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in install(tmp_path / "store").items():
        monkeypatch.setenv(key, value)
    text(tmp_path)
    given = DataConfig(**config(tmp_path, "objects://bucket/cache"))
    good = prepare(given).splits["train"]
    tokens = good.first(10**9)
    copies = sorted(path for path in (tmp_path / "local").rglob("*") if path.is_file())
    assert len(copies) == FILES and all(path.name.isalnum() for path in copies)
    gone = next(path for path in copies if path.read_bytes() == _bin(good, 4))
    corrupt = next(path for path in copies if path != gone)
    data = bytearray(corrupt.read_bytes())
    data[3] ^= 1
    corrupt.write_bytes(data)
    gone.unlink()
    (remote := next((tmp_path / "store").rglob("00004-*.bin"))).write_bytes(b"shorter")
    repaired = prepare(given).splits["train"]
    assert repaired.fingerprint == good.fingerprint
    assert (repaired.first(10**9) == tokens).all()
    assert remote.read_bytes() == _bin(good, 4)


def _bin(text: object, index: int) -> bytes:
    reader = text.sources[0].sections[index].reader  # pyright: ignore
    return os.pread(reader._descriptor, 1 << 24, 0)


def kill_law(root: str, tmp_path: Path, kills: int, within: float) -> None:
    """Kills as many runs of prepare_data, each within so many seconds; then compares with a run that is not disturbed.

    The time counts from the start for one in four, and from the first shard on for the others, however slow the start is.
    """
    text(tmp_path, copies=5000, kind="jsonl")  # some 60 MB: beyond what one process does alone
    args = arguments(tmp_path, root, "data.tokenize_workers=2")
    rng, killed, partly = random.Random(kills), 0, 0
    for _ in range(kills):
        process = prepare_data(args)
        if rng.random() > 0.25:
            while process.poll() is None and not [*tmp_path.glob("cache/.tokens*"), *tmp_path.glob("local/.tokens*")]:
                time.sleep(0.02)
        try:
            process.wait(timeout=rng.uniform(0.0, within))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        done = [name for name in objects(root, tmp_path) if name.endswith(".json")]
        partly += 0 < len(done) < FILES
        if len(done) > FILES:  # complete: from the start again
            for path in (tmp_path / ("store/objects/bucket" if "://" in root else "cache")).rglob("*.*"):
                path.unlink()
        deadline = time.monotonic() + 20
        while of_session(process.pid):
            assert time.monotonic() < deadline, "a process outlives its parent"
            time.sleep(0.05)
    assert killed >= kills // 2 and partly, "no run was cut off in the middle: nothing is shown"
    kept = {name: data for name, data in objects(root, tmp_path).items() if name.endswith(".bin")}
    finish(prepare_data(args))
    found = objects(root, tmp_path)
    assert all(found[name] == data for name, data in kept.items())
    finish(prepare_data(arguments(tmp_path, str(tmp_path / "alone"), "data.tokenize_workers=2")))
    alone = {f"{p.parent.name}/{p.name}": p.read_bytes() for p in (tmp_path / "alone").glob("*/*")}
    assert found == dict(sorted(alone.items())) and len(alone) == 2 * FILES + 1
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()], "scratch files of killed runs are not removed"


@pytest.mark.slow
def test_killed_twenty_times_the_shards_are_the_same(root: str, tmp_path: Path) -> None:
    kill_law(root, tmp_path, 20, within=6.0)


def test_an_existing_shard_is_not_made_again(root: str, tmp_path: Path) -> None:
    text(tmp_path)
    prepare(DataConfig(**config(tmp_path, root)))
    folder = tmp_path / ("store/objects/bucket/cache" if "://" in root else "cache")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.bin")}
    for path in [*folder.rglob("manifest.json"), *folder.rglob("00003*.json"), *folder.rglob("00007*.bin")]:
        path.unlink()
    prepare(DataConfig(**config(tmp_path, root)))
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.bin")}
    assert {path.name[:5] for path in before if after[path] != before[path]} == {"00003", "00007"}


@pytest.mark.parametrize(("step", "first", "last"), [(10, "0:01:50", "0:00:10"), (10_000, "1 day, 6:33:20", "2:46:40")])
def test_progress_has_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, step: int, first: str, last: str
) -> None:
    text(tmp_path)
    monkeypatch.setattr(build, "_REPORT", 0.0)
    clock = iter(range(0, 10**9, step))
    monkeypatch.setattr(build.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level("INFO"):
        prepare(DataConfig(**config(tmp_path, str(tmp_path / "cache"))))
    lines = [r.getMessage() for r in caplog.records if " left" in r.getMessage()]
    assert lines[0] == f"data: 1 of 12 shards, about {first} left" and lines[-1] == f"data: 11 of 12 shards, about {last} left"


def test_the_store_is_queried_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed once, and its metadata read several at a time."""
    text(tmp_path)
    listed, reading, most = list[str](), set[str](), list[int]()
    names, read = Store.names, Store.read

    def count_names(self: Store, folder: str) -> set[str]:
        listed.append(folder)
        return names(self, folder)

    def slow_read(self: Store, name: str) -> bytes | None:
        if name.endswith(".json"):
            reading.add(name)
            most.append(len(reading))
            time.sleep(0.01)
            reading.discard(name)
        return read(self, name)

    monkeypatch.setattr(Store, "names", count_names)
    monkeypatch.setattr(Store, "read", slow_read)
    prepare(DataConfig(**config(tmp_path, str(tmp_path / "cache"))))
    assert len(listed) == 1 and max(most) > 1 and len(most) == FILES + 3


@pytest.mark.slow
def test_two_processes_may_prepare_the_same(root: str, tmp_path: Path) -> None:
    text(tmp_path, copies=20)
    for process in [prepare_data(arguments(tmp_path, root)) for _ in range(3)]:
        finish(process)
    found = objects(root, tmp_path)
    assert len(found) == 2 * FILES + 1
    prepare(DataConfig(**config(tmp_path, str(tmp_path / "alone"))))
    assert list(found.values()) == [p.read_bytes() for p in sorted((tmp_path / "alone").glob("*/*"))]


def run_processes(tmp_path: Path, roots: list[str], *more: str) -> list[dict[str, Any]]:
    """What each process of a run printed: one for each root of a cache."""
    (folder := tmp_path / "barriers").mkdir()
    commands = [
        [str(len(roots)), str(i), str(folder), *arguments(tmp_path, root, f"data.local_dir={tmp_path}/local{i}", *more)]
        for i, root in enumerate(roots)
    ]
    return [json.loads(finish(process).splitlines()[-1]) for process in [start(f"-c\0{PROCESS}", each) for each in commands]]


def test_processes_of_a_run_share_the_shards_out(root: str, tmp_path: Path) -> None:
    text(tmp_path)
    one, two, three = run_processes(tmp_path, [root] * 3)
    assert one["tokens"] == two["tokens"] == three["tokens"]
    assert [each["made"] for each in (one, two, three)] == [list(range(i, FILES, 3)) for i in range(3)]
    assert one["barriers"] == two["barriers"] == three["barriers"] == 5


def test_processes_that_share_no_cache_make_all_shards(tmp_path: Path) -> None:
    text(tmp_path)
    one, two = run_processes(tmp_path, [str(tmp_path / "a"), str(tmp_path / "b")], "data.cache_is_shared=false")
    assert one["tokens"] == two["tokens"] and one["barriers"] == two["barriers"] == 0
    assert one["made"] == two["made"] == list(range(FILES))


class Run:
    """The processes of a run as threads of this one. After an error in one, the others' barriers fail, as JAX's do."""

    def __init__(self, n: int, monkeypatch: pytest.MonkeyPatch):
        self.n, self._barrier, self._tokenize = n, threading.Barrier(n, timeout=10), build.tokenize_shard
        self.made: list[tuple[int, int]] = []  # process and shard
        monkeypatch.setattr(build, "tokenize_shard", self._make)

    def _make(self, target: Any, shard: Any, index: int, threads: int) -> None:
        self.made.append((int(threading.current_thread().name), index))
        self._tokenize(target, shard, index, threads)

    def prepare(self, *configs: DataConfig) -> list[str | Exception]:
        """The fingerprint, or the error, of each process."""
        results: list[str | Exception] = [""] * self.n

        def barrier(name: str) -> None:
            try:
                self._barrier.wait()
            except threading.BrokenBarrierError:
                raise ConfigError(f"{name}: another process failed") from None

        def process(i: int) -> None:
            try:
                results[i] = prepare(configs[i], Processes(self.n, i, barrier)).splits["train"].fingerprint
            except ConfigError as error:
                results[i] = error
                self._barrier.abort()

        running = [threading.Thread(target=process, args=(i,), name=str(i), daemon=True) for i in range(self.n)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(timeout=15)
        return results


@pytest.mark.parametrize("corrupt", [[1], [0, 1], [3, 7, 8]])
def test_a_corrupt_shard_is_repaired_once(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrupt: list[int]) -> None:
    """By the process whose share it is in; the others wait."""
    text(tmp_path)
    prepare(DataConfig(**config(tmp_path, root)))
    intact, run = objects(root, tmp_path), Run(3, monkeypatch)
    for i in corrupt:
        (path,) = tmp_path.rglob(f"{i:05d}-of-*.bin")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = run.prepare(*(DataConfig(**config(tmp_path, root, local_dir=f"{tmp_path}/local of {i}")) for i in range(3)))
    assert len(set(found)) == 1 and isinstance(found[0], str) and found[0]
    assert sorted(run.made, key=lambda each: each[1]) == [(i % 3, i) for i in corrupt]
    assert objects(root, tmp_path) == intact


def test_corruption_that_one_process_sees_is_no_deadlock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others, which find all in order, pass the same barriers."""
    text(tmp_path)
    given = DataConfig(**config(tmp_path, str(tmp_path / "cache")))
    good, run, fetch = prepare(given).splits["train"].fingerprint, Run(3, monkeypatch), Store.fetch
    once = iter([True])

    def fetch_badly(self: Store, name: str, size: int, sha256: str) -> Path:
        if threading.current_thread().name != "1" and "00004" in name and next(once, False):
            raise Corrupt("00004: wrong checksum")
        return fetch(self, name, size, sha256)

    monkeypatch.setattr(Store, "fetch", fetch_badly)
    monkeypatch.setattr("mutransformer.data.sources.files.ThreadPoolExecutor", _InThisThread)
    assert run.prepare(given, given, given) == [good] * 3 and not run.made and next(once, None) is None


class _InThisThread:
    """A pool of no threads, so that the name of the thread is that of the process."""

    def __init__(self, _: int):
        self.map = map

    def __enter__(self) -> "_InThisThread":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def test_a_process_that_fails_does_not_hang_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text(tmp_path)
    bad = write_bad_line(tmp_path / "text/04.jsonl.gz")
    found = Run(3, monkeypatch).prepare(*[DataConfig(**config(tmp_path, str(tmp_path / "cache")))] * 3)
    assert re.search(rf"data: {bad}:1: not JSON", str(found[1]))
    assert all("tokenized: another process failed" in str(found[i]) for i in (0, 2))
    assert not list(tmp_path.glob("cache/*/manifest.json"))


def write_bad_line(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"no json\n"))
    return path


def test_separate_caches_that_are_said_to_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text(tmp_path)
    found = Run(2, monkeypatch).prepare(*(DataConfig(**config(tmp_path, f"{tmp_path}/cache{i}")) for i in range(2)))
    assert "00001-of-00012.json: No such file or directory" in str(found[0]) and "data.cache_is_shared=false" in str(found[0])
    assert isinstance(found[1], ConfigError)


FAILING = """
import sys, time
from mutransformer.errors import ConfigError
from mutransformer.config.run import DistributedConfig
from mutransformer.cli import run_cli
from mutransformer.sharding.processes import all_processes, join_processes
def run():
    join_processes(DistributedConfig(coordinator=sys.argv[1], n_process=2, process_id=int(sys.argv[2])))
    processes = all_processes()
    processes.barrier("met")
    if processes.index == int(sys.argv[3]):
        raise ConfigError("no text")
    processes.barrier("tokenized")
sys.exit(run_cli(run))
"""


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_barrier_ends_when_a_process_fails(failing: int) -> None:
    """JAX alone would let the other wait for five minutes, and then abort both with a stack trace."""
    address, began = f"127.0.0.1:{free_port()}", time.monotonic()
    running = [start(f"-c\0{FAILING}", [address, str(i), str(failing)]) for i in range(2)]
    errors = [finish(process, code=2) for process in running]
    assert "error: no text" in errors[failing] and "Traceback" not in "".join(errors)
    assert f"error: tokenized: process {failing} failed: no text" in errors[1 - failing]
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    text(tmp_path, copies=5000, kind="jsonl")
    process = prepare_data(arguments(tmp_path, str(tmp_path / "cache"), "data.tokenize_workers=2"))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/.tokens*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    busy = {int(path.name.split("~")[-2]) for path in tmp_path.glob("cache/.tokens*")} - {process.pid}
    os.kill(busy.pop(), signal.SIGKILL)
    err = finish(process, code=2)
    assert err.strip().splitlines()[-1].startswith("error: data: a process that tokenized was killed")
    assert "Traceback" not in err and not list(tmp_path.glob("cache/*/manifest.json"))


@pytest.mark.slow
def test_a_failure_ends_the_other_workers_at_once(tmp_path: Path) -> None:
    text(tmp_path, copies=20_000, kind="jsonl")  # some 20 MB a file
    bad = tmp_path / "text/00.jsonl"
    bad.write_text("{\n" + bad.read_text(encoding="utf-8"), encoding="utf-8")
    process = prepare_data(arguments(tmp_path, str(tmp_path / "cache"), "data.tokenize_workers=2"))
    assert "00.jsonl:1: a JSON object over several lines" in finish(process, code=2)
    assert not list(tmp_path.glob("cache/*/*.json")) and not list(tmp_path.glob("cache/.*"))
    deadline = time.monotonic() + 20
    while of_session(process.pid):
        assert time.monotonic() < deadline, "a process outlives its parent"
        time.sleep(0.05)


def test_a_full_disk(tmp_path: Path) -> None:
    """On a real one of two megabytes, where it may be mounted; what is there is kept, and with more room the rest is made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of a set size cannot be mounted here")
    try:
        text(tmp_path, copies=100)
        with pytest.raises(ConfigError, match=r"^data\.cache_dir = .*cache: cannot write there: No space left on device$"):
            prepare(DataConfig(**config(tmp_path, str(disk / "cache"))))
        assert not list(disk.glob("cache/*/manifest.json")) and not list(disk.glob("cache/.*"))
        notes = list(disk.glob("cache/*/*.json"))
        assert 0 < len(notes) < FILES
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        full = prepare(DataConfig(**config(tmp_path, str(disk / "cache")))).splits["train"]
        assert full.fingerprint == prepare(DataConfig(**config(tmp_path, str(tmp_path / "b")))).splits["train"].fingerprint
        del full
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_store_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.cache_dir = nosuch://bucket/cache: cannot \w+ there: .*nosuch"):
        prepare(DataConfig(**config(tmp_path, "nosuch://bucket/cache")))
    for key, value in install(tmp_path / "store").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(
        "object_store.ObjectStore.put_file", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("403 Forbidden"))
    )
    with pytest.raises(ConfigError, match=r"data\.cache_dir = objects://bucket/cache: cannot write there: 403 Forbidden"):
        prepare(DataConfig(**config(tmp_path, "objects://bucket/cache")))
    assert not Store("objects://bucket/cache", str(tmp_path)).names("anything") and ATTEMPTS > 1
