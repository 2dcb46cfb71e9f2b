"""Tokenising a source: its parts to shards, by several processes and hosts at once, each shard once, going on after a kill.

A shard is a file and beside it a note with its hash, written last: without its note it is as good as not there. When all are
there a manifest of them is written. Hosts of one job share the shards out; each waits for the others' while they give signs of
life, and does them itself if there are none, so that a cache that hosts do not share comes about as well.
"""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from mutransformer.config import ConfigError, check
from mutransformer.data.cache import Damaged, Store, describe, seal, unseal
from mutransformer.data.files import cut
from mutransformer.data.parts import Part, Split
from mutransformer.data.shards import Writer, dtype_for
from mutransformer.data.sources import Accepted, Shares, Unreadable
from mutransformer.data.tokenize import Tokenizer

SILENCE = 30.0  # seconds without a sign of life after which a host's shards are done by others
ATTEMPTS = 5  # at a part that is read over the network, with 1, 2, 4, 8 seconds between them

_SEGMENT = 1 << 20  # bytes of a document tokenised in one piece: SentencePiece takes some fifty times as much memory
_CHUNK = 4 << 20  # bytes of text tokenised in one call
_ALONE = 32 << 20  # bytes of text for which no process is started
_REPORT = 10.0  # seconds between lines of progress

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Job:
    """What makes shards out of parts. Can be sent to another process."""

    store: Store
    folder: str  # in the store
    key: str  # of the source's settings
    n_parts: int
    tokenizer: Tokenizer
    add_bos: bool
    shares: Shares
    on_bad_record: Literal["error", "skip"]

    def name(self, index: int) -> str:
        return f"{index:05d}-of-{self.n_parts:05d}"

    def note(self, index: int) -> dict[str, Any]:
        """What is told of a shard.

        Raises:
            Damaged: it is not there, or not as it was written.
        """
        name = f"{self.folder}/{self.name(index)}.json"
        return unseal(name, self.store.read(name))

    def whole(self, index: int) -> bool:
        """Whether the note of a shard that is there can be relied on."""
        try:
            return bool(self.note(index))
        except Damaged:
            return False

    def done(self) -> set[int]:
        """The shards that are there."""
        there = self.store.names(self.folder)
        return {i for i in range(self.n_parts) if {f"{self.name(i)}.json", f"{self.name(i)}.bin"} <= there}


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
    again = again | {i for i in job.done() if not job.whole(i)}
    missing = sorted((set(range(job.n_parts)) - job.done()) | again)
    mine = [i for i in missing if i % n_process == process]
    if missing:
        _log.info("tokenising %d of %d shards to %s/%s", len(missing), job.n_parts, job.store.root, job.folder)
    with _signs_of_life(job, process, active=n_process > 1 and bool(missing)):
        _make(job, parts, mine, processes)
        rest = set(missing) - set(mine)
        if rest:
            _make(job, parts, sorted(_wait(job, rest, again, n_process, process)), processes)
        notes = [job.note(i) for i in range(job.n_parts)]
    if missing:
        _report(job, notes)
    return {"shards": notes}


def _wait(job: Job, rest: set[int], again: set[int], n_process: int, process: int) -> set[int]:
    """Returns once the other hosts have made their shards, or with those whose hosts are silent."""
    heard: dict[int, tuple[bytes, float]] = dict.fromkeys(range(n_process), (b"", time.monotonic()))
    told = False
    while True:
        left = {i for i in rest if i not in job.done() or i in again}
        for host in {i % n_process for i in left}:
            sign = job.store.read(_sign(job, host)) or b""
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
        time.sleep(0.5)


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
            _shard(job, parts[i], i, threads=processes)
            progress.at(n)
        return
    # Not forked: JAX and tokenizers have threads. Killed with their parent, see _start.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start) as pool:
        futures: set[Future[None]] = {pool.submit(_shard, job, parts[i], i, 1) for i in indices}
        try:
            while futures:
                done, futures = wait(futures, timeout=_REPORT, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress.at(len(indices) - len(futures))
        except BrokenProcessPool:
            raise ConfigError(
                f"{job.key}: a process that tokenised was killed, perhaps for memory; lower data.processes"
            ) from None
        finally:
            for future in futures:
                future.cancel()


def _start() -> None:
    """In a process that tokenises: one thread for the tokenizer, and no life after the parent's."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


class _Progress:
    """Tells now and then how many of the shards are made, and about how long the rest will take."""

    def __init__(self, job: Job, n: int):
        self._job, self._n = job, n
        self._started = self._told = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now - self._told >= _REPORT and 0 < done < self._n:
            self._told = now
            left = time.strftime("%H:%M:%S", time.gmtime((now - self._started) / done * (self._n - done)))
            _log.info("%s: %d of %d shards, about %s left", self._job.key, done, self._n, left)


def _report(job: Job, notes: list[dict[str, Any]]) -> None:
    total = {
        what: sum(note["splits"][split][what] for note in notes for split in note["splits"]) for what in ("tokens", "documents")
    }
    _log.info("%s: tokenised %d documents, %.1fM tokens", job.key, total["documents"], total["tokens"] / 1e6)
    if skipped := sum(note["skipped"] for note in notes):
        first = next(note["first_skipped"] for note in notes if note["skipped"])
        _log.warning("%s: %d bad records were skipped, the first: %s", job.key, skipped, first)


T = TypeVar("T")


def retried(part: Part, key: str, action: Callable[[], T]) -> T:
    """What action() gives that reads a part; tried again if the part is read over the network.

    Raises:
        ConfigError: the part cannot be read.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Unreadable as error:
            if attempt == ATTEMPTS or not part.remote:
                raise ConfigError(f"{key}: {error}") from error.__cause__
            _log.warning("%s: %s; trying again in %d s", key, error, 2 ** (attempt - 1))
            time.sleep(2 ** (attempt - 1))
    raise AssertionError


def _shard(job: Job, part: Part, index: int, threads: int) -> None:
    """Makes a shard and then its note."""
    name = f"{job.folder}/{job.name(index)}"
    file = job.store.scratch(name)
    try:
        facts = retried(part, job.key, lambda: _write(job, part, Writer(file, dtype_for(job.tokenizer.n_vocab)), threads))
        facts |= {"file": f"{job.name(index)}.bin"} | describe(file)
        job.store.put(f"{name}.bin", file)
        job.store.write(f"{name}.json", seal(facts))
    except OSError as error:
        raise ConfigError(f"data.cache_dir = {job.store.root}: cannot write there: {error.strerror}") from None
    finally:
        file.unlink(missing_ok=True)


def _write(job: Job, part: Part, writer: Writer, threads: int) -> dict[str, Any]:
    """Tokenises a part. Returns what is to be noted of its shard."""
    accepted = Accepted(part, job.key, job.on_bad_record, job.shares)
    with closing(writer):
        chunk: list[_Piece] = []
        size = 0
        for data, split in accepted:
            segments = list(cut(data, _SEGMENT)) if len(data) > _SEGMENT else [data]
            for k, segment in enumerate(segments, start=1):
                chunk.append(_Piece(segment, split, k == 1, k == len(segments)))
                size += len(segment)
                if size >= _CHUNK:
                    _tokenise(job, chunk, writer, threads)
                    chunk, size = [], 0
        if chunk:
            _tokenise(job, chunk, writer, threads)
        return {"splits": writer.finish(), "skipped": accepted.skipped, "first_skipped": accepted.first_skipped}


class _Piece(NamedTuple):
    data: bytes
    split: Split
    begins: bool  # a document
    ends: bool


def _tokenise(job: Job, chunk: list[_Piece], writer: Writer, threads: int) -> None:
    tokenizer = job.tokenizer
    bos, eos = [np.array([tokenizer.bos_id], np.int32)], [np.array([tokenizer.eos_id], np.int32)]
    for ids, piece in zip(tokenizer.encode([piece.data.decode() for piece in chunk], threads), chunk, strict=True):
        parts = [*(bos if job.add_bos and piece.begins else []), ids, *(eos if piece.ends else [])]
        tokens = np.concatenate(parts) if len(parts) > 1 else ids
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            check(
                0 <= low and high < tokenizer.n_vocab,
                f"data.tokenizer: it gave the ids {low} ... {high}, outside its {tokenizer.n_vocab} ids",
            )
        writer.add(piece.split, tokens, len(piece.data), piece.ends)
