"""Tokenizes the shards of a source that are missing, in several processes; a build that was killed is resumed.

The processes of a run share the shards out by their index, and each starts worker processes for its share. A token shard is a
file and, written after it, its metadata with the checksum: without metadata it counts as missing.
"""

import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mutransformer.config.data import DataConfig
from mutransformer.data.cache.dataset import ShardWriter, dtype_for
from mutransformer.data.cache.store import Corrupt, Store, checksum
from mutransformer.data.sources.files import map_parallel
from mutransformer.data.sources.registry import RecordReader, with_retries
from mutransformer.data.sources.source import SourceShard, Split
from mutransformer.data.sources.text import cut
from mutransformer.data.tokenizers.round_trip import RoundTrip
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.data.workers import set_up_worker, without_signals
from mutransformer.errors import ConfigError, check, translate_errors
from mutransformer.sharding.processes import Processes

NOT_SHARED = "; set data.cache_is_shared=false if the processes of the run do not see the same folder"

_IN_PROCESS = 32 << 20  # bytes of text up to which no worker process is started
_REPORT = 10.0  # seconds between lines of progress
_SEGMENT = 1 << 20  # bytes of a document tokenized in one piece: SentencePiece takes about fifty times as much memory
_CHUNK = 128 << 10  # bytes of text that a thread tokenizes in one call: more would not fit a processor's cache

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenShards:
    """Where the token shards of a source lie, and how they are made. Can be pickled."""

    store: Store
    folder: str  # in the store
    key: str  # of the source's settings
    n_shards: int
    tokenizer: Tokenizer
    config: DataConfig

    def name(self, index: int) -> str:
        return f"{index:05d}-of-{self.n_shards:05d}"

    def metadata(self, index: int) -> dict[str, Any]:
        """File name, size, checksum and counts of a shard. Raises Corrupt if they are missing or changed."""
        return self.store.read_json(f"{self.folder}/{self.name(index)}.json")

    def present(self) -> set[int]:
        """The shards that exist; their checksums are not verified."""
        names = self.store.names(self.folder)
        return {i for i in range(self.n_shards) if {f"{self.name(i)}.json", f"{self.name(i)}.bin"} <= names}

    def intact(self, index: int) -> bool:
        """Whether a shard exists and has its checksum."""
        try:
            stored = self.metadata(index)
            self.store.fetch(f"{self.folder}/{stored['file']}", stored["bytes"], stored["sha256"])
        except Corrupt:
            return False
        return True


def build(target: TokenShards, shards: Sequence[SourceShard], workers: int, processes: Processes) -> None:
    """Makes this process's share of the token shards, except those that exist and are intact.

    Process i of the run makes shards i, i + count, i + 2 * count, ... of the source, in as many worker processes. Raises
    ConfigError if a shard cannot be read, the tokenizer is broken, or the cache cannot be written.
    """
    share = range(processes.index, target.n_shards, processes.count)
    present = sorted(target.present() & set(share))
    intact = {i for i, good in zip(present, map_parallel(target.intact, present), strict=True) if good}
    missing = [i for i in share if i not in intact]
    if not missing:
        return
    _log.info("tokenizing %d of %d shards to %s/%s", len(missing), target.n_shards, target.store.root, target.folder)
    in_process = min(workers, len(missing)) <= 1 or 0 < sum(shards[i].size for i in missing) <= _IN_PROCESS
    started = reported = time.monotonic()
    for done in (_in_this_process if in_process else _in_workers)(target, shards, missing, workers):
        now = time.monotonic()
        if now - reported >= _REPORT and 0 < done < len(missing):
            reported = now
            left = timedelta(seconds=round((now - started) / done * (len(missing) - done)))
            _log.info("%s: %d of %d shards, about %s left", target.key, done, len(missing), left)


def _in_this_process(target: TokenShards, shards: Sequence[SourceShard], missing: list[int], threads: int) -> Iterator[int]:
    """Tokenizes shards, in several threads. Yields the number that is done."""
    for done, i in enumerate(missing, start=1):
        tokenize_shard(target, shards[i], i, threads)
        yield done


def _in_workers(target: TokenShards, shards: Sequence[SourceShard], missing: list[int], workers: int) -> Iterator[int]:
    """Tokenizes shards in worker processes. Yields the number that is done."""
    # Not forked: JAX and tokenizers have threads.
    context = multiprocessing.get_context("spawn")
    stop, to_stop = context.Pipe(duplex=False)
    workers, setup = min(workers, len(missing)), {"initializer": _start, "initargs": (target, stop)}
    with to_stop, stop, ProcessPoolExecutor(workers, mp_context=context, **setup) as pool:
        with without_signals():
            futures = {pool.submit(_tokenize_in_worker, shards[i], i) for i in missing}
        try:
            while futures:
                done, futures = wait(futures, timeout=_REPORT, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                yield len(missing) - len(futures)
        except BrokenProcessPool:
            killed = "a process that tokenized was killed, perhaps for memory; lower data.tokenize_workers"
            raise ConfigError(f"{target.key}: {killed}") from None
        finally:
            if futures:  # a shard failed: end the workers now, so that its error is reported before the others are done
                to_stop.close()
                pool.shutdown(cancel_futures=True)
                target.store.clear()


_target: TokenShards  # of a worker: sent once, since a tokenizer may be large and caches the words that it has seen


def _start(target: TokenShards, stop: Connection) -> None:
    """Sets up a worker: one thread for the tokenizer, and an end when the parent dies or closes the other end of `stop`."""
    global _target
    set_up_worker(stop)
    _target = target
    os.environ["RAYON_NUM_THREADS"] = "1"


def _tokenize_in_worker(shard: SourceShard, index: int) -> None:
    tokenize_shard(_target, shard, index, threads=1)


def tokenize_shard(target: TokenShards, shard: SourceShard, index: int, threads: int) -> None:
    """Writes a token shard and then its metadata. Raises ConfigError as build() does."""
    name = f"{target.folder}/{target.name(index)}"
    file = target.store.scratch(name)
    try:
        with translate_errors(f"data.cache_dir = {target.store.root}: cannot write there", OSError):
            facts = with_retries(shard, target.key, target.config, partial(_write, target, file, threads))
            facts |= {"place": shard.place, "file": f"{target.name(index)}.bin"} | checksum(file)
        target.store.put(f"{name}.bin", file)
        target.store.write_json(f"{name}.json", facts)
    finally:
        file.unlink(missing_ok=True)


class _Piece(NamedTuple):
    data: bytes
    split: Split
    begins: bool  # a document
    ends: bool


def _write(target: TokenShards, path: Path, threads: int, reader: RecordReader) -> dict[str, Any]:
    """Tokenizes a shard to a file. Returns its counts by split, of records, of unknown tokens, and of text that is lost."""
    sample, n_unknown = RoundTrip(target.tokenizer), 0
    with closing(ShardWriter(path, dtype_for(target.tokenizer.n_vocab))) as writer:
        chunk: list[_Piece] = []
        size = 0
        for data, split in reader:
            start = 0
            for segment in cut(data, _SEGMENT):
                stop = start + len(segment)
                chunk.append(_Piece(segment, split, start == 0, stop == len(data)))
                start = stop
                size += len(segment)
                if size >= _CHUNK * threads:
                    n_unknown += _tokenize(target, chunk, writer, sample, threads)
                    chunk, size = [], 0
        if chunk:
            n_unknown += _tokenize(target, chunk, writer, sample, threads)
        return {"splits": writer.finish(), **asdict(reader.counts), "unknown": n_unknown, **sample.facts()}


def _tokenize(target: TokenShards, chunk: list[_Piece], writer: ShardWriter, sample: RoundTrip, threads: int) -> int:
    """Writes the tokens of some texts. Returns how many of them are unknown."""
    tokenizer = target.tokenizer
    eos = np.array([tokenizer.eos_id], np.int32)
    bos = [np.array([tokenizer.bos_id], np.int32)] if target.config.add_bos else []
    texts = [piece.data.decode() for piece in chunk]
    encoded = tokenizer.encode(texts, threads)
    joined = np.concatenate([eos, *bos, *encoded])
    low, high = int(joined.min()), int(joined.max())
    outside = f"outside its {tokenizer.n_vocab} ids"
    check(0 <= low and high < tokenizer.n_vocab, f"data.tokenizer: it gave the ids {low} ... {high}, {outside}")
    for text, ids, piece in zip(texts, encoded, chunk, strict=True):
        framed = [*(bos if piece.begins else []), ids, *([eos] if piece.ends else [])]
        writer.add(piece.split, framed, len(piece.data), piece.ends)
        sample.add(text, ids)
    return 0 if tokenizer.unk_id is None else int((joined[1 + len(bos) :] == tokenizer.unk_id).sum())


def collect(target: TokenShards) -> list[dict[str, Any]]:
    """The metadata of all shards, after all processes have built theirs; logs the totals.

    Raises ConfigError if a shard is missing.
    """
    with translate_errors(f"data.cache_dir = {target.store.root}", Corrupt, lambda error: f"{error}{NOT_SHARED}"):
        metadata = map_parallel(target.metadata, range(target.n_shards))
    counts = [split for shard in metadata for split in shard["splits"].values()]
    n_documents, n_tokens = (sum(split[what] for split in counts) for what in ("documents", "tokens"))
    _log.info("%s: tokenized %s documents, %s tokens", target.key, f"{n_documents:,}", f"{n_tokens:,}")
    return metadata
