"""Tokenising a source: its parts to shards, by several processes and hosts at once, each shard once, going on after a kill.

When all shards are there a manifest of them is written. Hosts of one job share the shards out; each waits for the others' while
they give signs of life, and does them itself if there are none, so that a cache that hosts do not share comes about as well.
"""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from mutransformer.data.cache.store import Damaged
from mutransformer.data.cache.tokenize_shard import Job, shard
from mutransformer.data.sources.readers import Part
from mutransformer.errors import ConfigError

SILENCE = 30.0  # seconds without a sign of life after which a host's shards are done by others

_ALONE = 32 << 20  # bytes of text for which no process is started
_REPORT = 10.0  # seconds between lines of progress

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Host:
    """Which of the processes of a job this is."""

    n_process: int = 1
    process: int = 0

    def after_first(self, there: Callable[[], bool]) -> None:
        """Returns at once in process 0; in another when something is there, or has not come for a while."""
        until = time.monotonic() + SILENCE
        while self.process and not there() and time.monotonic() < until:
            time.sleep(0.2)


def build(job: Job, parts: Sequence[Part], again: set[int], processes: int, n_process: int, process: int) -> dict[str, Any]:
    """Makes what is missing of a source's shards, or waits until the job's other hosts have.

    Args:
        job: how.
        parts: of the source, all of them.
        again: shards that are there and damaged.
        processes: to start on this host.
        n_process: hosts of the job.
        process: the index of this one.

    Returns:
        The manifest of the shards, by "shards".

    Raises:
        ConfigError: a part cannot be read, the tokenizer is broken, or the cache cannot be written.
    """
    there = job.done()
    again = again | {i for i, whole in zip(there, _each(job.whole, there), strict=True) if not whole}
    missing = sorted((set(range(job.n_parts)) - there) | again)
    mine = [i for i in missing if i % n_process == process]
    if missing:
        _log.info("tokenising %d of %d shards to %s/%s", len(missing), job.n_parts, job.store.root, job.folder)
    # Not while it waits: two that wait would keep each other waiting.
    with _signs_of_life(job, process, active=n_process > 1 and bool(mine)):
        _make(job, parts, mine, processes)
    rest = set(missing) - set(mine)
    if rest:
        _make(job, parts, sorted(_wait(job, rest, again, n_process)), processes)
    notes = _each(job.note, range(job.n_parts))
    if missing:
        _report(job, notes)
    return {"shards": notes}


def _each(action: Callable[[int], T], indices: Iterable[int]) -> list[T]:
    """What an action that reads the store gives for each index; several at once, for a store may take long to answer."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(action, indices))


def _wait(job: Job, rest: set[int], again: set[int], n_process: int) -> set[int]:
    """Returns once the other hosts have made their shards, or with those whose hosts are silent."""
    heard: dict[int, tuple[bytes, float]] = dict.fromkeys(range(n_process), (b"", time.monotonic()))
    left, told = set(rest), False
    while True:
        began = time.monotonic()
        there = job.done()
        damaged = sorted(left & there & again)
        left -= (there - again) | {i for i, mended in zip(damaged, _each(partial(_mended, job), damaged), strict=True) if mended}
        looked = time.monotonic() - began
        others = sorted({i % n_process for i in left})
        for host, sign in zip(others, _each(lambda host: job.store.read(_sign(job, host)) or b"", others), strict=True):
            if sign != heard[host][0]:
                heard[host] = sign, time.monotonic()
        silent = {i for i in left if time.monotonic() - heard[i % n_process][1] > SILENCE}
        if silent == left:
            if left:
                _log.warning("no other process makes the %d shards that are left: this one does", len(left))
            return left
        if not told:
            _log.info("waiting for the other processes' shards")
            told = True
        # A damaged shard is read to look at it: not most of the time, but as often as signs of life may come.
        time.sleep(min(max(0.5, 9 * looked), SILENCE / 6))


def _mended(job: Job, index: int) -> bool:
    """Whether a shard that was damaged is whole again."""
    try:
        note = job.note(index)
        job.store.fetch(f"{job.folder}/{note['file']}", note["bytes"], note["sha256"])
    except Damaged:
        return False
    return True


def _sign(job: Job, process: int) -> str:
    return f"{job.folder}/alive-{process}"


class _signs_of_life:
    """Writes a growing number to the store while it lasts."""

    def __init__(self, job: Job, process: int, active: bool):
        self._name, self._store, self._active, self._over = _sign(job, process), job.store, active, threading.Event()

    def __enter__(self) -> None:
        if self._active:
            threading.Thread(target=self._beat, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    def _beat(self) -> None:
        while True:
            try:
                self._store.write(self._name, f"{os.getpid()} {time.time()}".encode())
            except ConfigError as error:
                _log.warning("%s", error)
            if self._over.wait(SILENCE / 6):
                return


def _make(job: Job, parts: Sequence[Part], indices: list[int], processes: int) -> None:
    size = sum(parts[i].size for i in indices)
    workers, progress = min(processes, len(indices)), _Progress(job, len(indices))
    if workers <= 1 or (0 < size <= _ALONE):
        for n, i in enumerate(indices, start=1):
            shard(job, parts[i], i, threads=processes)
            progress.at(n)
        return
    # Not forked: JAX and tokenizers have threads.
    context = multiprocessing.get_context("spawn")
    told_to_end, to_end = context.Pipe(duplex=False)
    with (
        to_end,
        told_to_end,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job, told_to_end)) as pool,
    ):
        futures = {pool.submit(_shard_of_job, parts[i], i) for i in indices}
        try:
            while futures:
                done, futures = wait(futures, timeout=_REPORT, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress.at(len(indices) - len(futures))
        except BrokenProcessPool:
            raise ConfigError(
                f"{job.key}: a process that tokenised was killed, perhaps for memory; lower data.tokenize_workers"
            ) from None
        finally:
            if futures:  # one failed: its error is told at once, and not when the others are through with their shards
                to_end.close()
                pool.shutdown(cancel_futures=True)
                job.store.clear()


_job: Job  # of a process that tokenises: sent once, for a tokenizer may be large and gets faster by what it has seen


def _start(job: Job, told_to_end: Connection) -> None:
    """In a process that tokenises: one thread for the tokenizer, and no life after the parent's, or once told to end."""
    global _job
    _job = job
    os.environ["RAYON_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        connection.wait([told_to_end, parent.sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _shard_of_job(part: Part, index: int) -> None:
    shard(_job, part, index, threads=1)


class _Progress:
    """Tells now and then how many of the shards are made, and about how long the rest will take."""

    def __init__(self, job: Job, n: int):
        self._job, self._n = job, n
        self._started = self._told = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now - self._told >= _REPORT and 0 < done < self._n:
            self._told = now
            left = _hours((now - self._started) / done * (self._n - done))
            _log.info("%s: %d of %d shards, about %s left", self._job.key, done, self._n, left)


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


def _report(job: Job, notes: list[dict[str, Any]]) -> None:
    total = {
        what: sum(note["splits"][split][what] for note in notes for split in note["splits"]) for what in ("tokens", "documents")
    }
    _log.info("%s: tokenised %d documents, %.1fM tokens", job.key, total["documents"], total["tokens"] / 1e6)
    if skipped := sum(note["skipped"] for note in notes):
        first = next(note["first_skipped"] for note in notes if note["skipped"])
        _log.warning("%s: %d bad records were skipped, the first: %s", job.key, skipped, first)
