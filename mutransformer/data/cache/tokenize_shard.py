"""What makes one shard out of one part of a source.

A shard is a file and beside it a note with its hash, written last: without its note it is as good as not there.
"""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from mutransformer.data.cache.shards import Writer, dtype_for
from mutransformer.data.cache.store import Damaged, Store, describe, seal, unseal
from mutransformer.data.sources.files import cut
from mutransformer.data.sources.readers import Part, Split
from mutransformer.data.sources.registry import Accepted, Unreadable
from mutransformer.data.sources.splits import Shares
from mutransformer.data.tokenizers.sentencepiece import Tokenizer
from mutransformer.errors import ConfigError, check

ATTEMPTS = 5  # at a part that is read over the network, with 1, 2, 4, 8 seconds between them

_SEGMENT = 1 << 20  # bytes of a document tokenised in one piece: SentencePiece takes some fifty times as much memory
_CHUNK = 128 << 10  # bytes of text that a thread tokenises in one call: what more gives in one does not fit a processor's cache

_log = logging.getLogger(__name__)


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


def shard(job: Job, part: Part, index: int, threads: int) -> None:
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
            start = 0
            for segment in cut(data, _SEGMENT):
                stop = start + len(segment)
                chunk.append(_Piece(segment, split, start == 0, stop == len(data)))
                start = stop
                size += len(segment)
                if size >= _CHUNK * threads:
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
    bos, eos = (np.array([i], np.int32) for i in (tokenizer.bos_id, tokenizer.eos_id))
    encoded = tokenizer.encode([piece.data.decode() for piece in chunk], threads)
    every = np.concatenate([eos, *([bos] if job.add_bos else []), *encoded])
    low, high = int(every.min()), int(every.max())
    check(
        0 <= low and high < tokenizer.n_vocab,
        f"data.tokenizer: it gave the ids {low} ... {high}, outside its {tokenizer.n_vocab} ids",
    )
    for ids, piece in zip(encoded, chunk, strict=True):
        before = [bos] if job.add_bos and piece.begins else []
        writer.add(piece.split, [*before, ids, eos] if piece.ends else [*before, ids], len(piece.data), piece.ends)
