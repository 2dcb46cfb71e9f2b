"""Tokens on the disk: the shards that hold them, and what a run trains and is evaluated on.

A shard is a file of the tokens of train, validation and test, zeros up to a multiple of 8 bytes, and then for each split in the
same order, as 64-bit numbers, the end of each document: the count of the split's tokens up to and including it. All numbers are
little-endian.
"""

import hashlib
import os
import shutil
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any
from weakref import finalize

import numpy as np
from jaxtyping import Int64, Integer

from mutransformer.data.cache.store import digest
from mutransformer.data.sources.source import SPLITS, Split
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import ConfigError

_BLOCK = 1 << 20  # tokens or documents processed together
_STRIDE = 128  # documents
_BUFFER = 8 << 20  # bytes of a held-out split that are kept in memory


def dtype_for(n_vocab: int) -> str:
    """The narrowest integer type that holds every id."""
    return "<u2" if n_vocab <= 1 << 16 else "<u4"


class ShardWriter:
    """Writes a shard, document by document. Tokens of train go to its file; what follows them is buffered beside it."""

    def __init__(self, path: Path, dtype: str):
        self._dtype = np.dtype(dtype)
        held_out = {split: SpooledTemporaryFile(_BUFFER, dir=str(path.parent)) for split in SPLITS[1:]}
        self._files: dict[str, Any] = {"train": open(path, "wb")} | held_out
        self._hash = {split: hashlib.sha256() for split in SPLITS}
        self._ends = {split: array("Q") for split in SPLITS}
        self._counts = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
        self._pending: dict[Split, list[Integer[np.ndarray, " _"]]] = {split: [] for split in SPLITS}
        self._n_pending = 0

    def add(self, split: Split, tokens: Sequence[Integer[np.ndarray, " _"]], n_bytes: int, ends: bool) -> None:
        """Adds tokens, and n_bytes of text that they stand for, to the last document of a split; `ends` completes it."""
        counts, n = self._counts[split], sum(map(len, tokens))
        counts["tokens"] += n
        counts["bytes"] += n_bytes
        if ends:
            counts["documents"] += 1
            self._ends[split].append(counts["tokens"])
        self._pending[split] += tokens
        self._n_pending += n
        if self._n_pending >= _BLOCK:
            self._write()

    def _write(self) -> None:
        for split, pending in self._pending.items():
            data = np.concatenate(pending).astype(self._dtype).tobytes() if pending else b""
            self._hash[split].update(data)
            self._files[split].write(data)
            pending.clear()
        self._n_pending = 0

    def finish(self) -> dict[str, Any]:
        """Completes the file. Returns the counts and the SHA-256 of the tokens of each split."""
        self._write()
        shard = self._files["train"]
        for split in SPLITS[1:]:
            self._files[split].seek(0)
            shutil.copyfileobj(self._files[split], shard, 1 << 20)
        shard.write(bytes(-shard.tell() % 8))
        for ends in self._ends.values():
            shard.write(np.array(ends, "<u8").tobytes())
        self.close()
        return {split: self._counts[split] | {"sha256": self._hash[split].hexdigest()} for split in SPLITS}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _Reader:
    """A file, read at any place by any thread. Can be pickled.

    Not memory-mapped: a page fault stops all Python threads, and the pages count as memory of this process.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        finalize(self, os.close, self._descriptor).atexit = False

    def __reduce__(self) -> Any:
        return _Reader, (self.path,)

    def read(self, n: int, offset: int) -> bytes:
        data = os.pread(self._descriptor, n, offset)
        if len(data) != n:
            raise OSError(None, "became shorter", str(self.path))
        return data


@dataclass(frozen=True)
class Section:
    """The tokens of one split in a shard."""

    reader: _Reader
    dtype: str
    at: int  # byte of its first token
    ends_at: int  # byte of its first document's end
    n_tokens: int
    n_documents: int

    def tokens(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        size = np.dtype(self.dtype).itemsize
        return np.frombuffer(self.reader.read((stop - start) * size, self.at + start * size), self.dtype)

    def ends(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        return np.frombuffer(self.reader.read((stop - start) * 8, self.ends_at + start * 8), "<i8")

    @cached_property
    def _some_ends(self) -> "array[int]":
        """The end of every _STRIDE-th document: small, and it finds the others with one short read."""
        blocks = range(0, self.n_documents, _BLOCK)
        found = (self.ends(k, min(k + _BLOCK, self.n_documents))[_STRIDE - 1 :: _STRIDE] for k in blocks)
        return array("q", b"".join(ends.astype(np.int64).tobytes() for ends in found))

    def ends_within(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Ends of documents, as token positions, after `start` and before `stop`."""
        first, last = (_STRIDE * bisect_left(self._some_ends, at) for at in (start, stop))
        ends = self.ends(first, min(last + _STRIDE, self.n_documents))
        return ends[ends.searchsorted(start, "right") : ends.searchsorted(stop)]


def open_shard(path: Path, dtype: str, facts: dict[str, Any]) -> dict[Split, Section]:
    """The splits of a shard, from the facts that ShardWriter.finish() returned."""
    reader, size = _Reader(path), np.dtype(dtype).itemsize
    at = 0
    ends_at = -(-sum(facts[split]["tokens"] for split in SPLITS) * size // 8) * 8
    found: dict[Split, Section] = {}
    for split in SPLITS:
        n_tokens, n_documents = facts[split]["tokens"], facts[split]["documents"]
        found[split] = Section(reader, dtype, at, ends_at, n_tokens, n_documents)
        at += n_tokens * size
        ends_at += n_documents * 8
    return found


@dataclass(frozen=True)
class TokenDataset:
    """The tokens of one split of a source: its documents in order, an eos after each. Can be pickled."""

    source: str
    split: Split
    sections: tuple[Section, ...]
    n_bytes: int  # of the text in UTF-8, for a loss in bits per byte
    fingerprint: str  # SHA-256 of the tokens; of the shards' checksums if there are several
    tokenizer_fingerprint: str
    eos_id: int

    @cached_property
    def _tokens_before(self) -> list[int]:
        """Of each section and of the end."""
        return [0, *accumulate(section.n_tokens for section in self.sections)]

    @cached_property
    def _documents_before(self) -> list[int]:
        return [0, *accumulate(section.n_documents for section in self.sections)]

    @property
    def n_tokens(self) -> int:
        return self._tokens_before[-1]

    @property
    def n_documents(self) -> int:
        return self._documents_before[-1]

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """Tokens start ... stop - 1, fewer at the end of the split."""
        within = self._within(start, stop)
        pieces = [s.tokens(max(0, start - first), min(stop - first, s.n_tokens)) for first, s in within if s.n_tokens]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint16), *pieces])

    def ends_within(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Ends of documents, as token positions, after `start` and before `stop`."""
        found = [first + s.ends_within(max(0, start - first), stop - first) for first, s in self._within(start, stop)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _within(self, start: int, stop: int) -> Iterator[tuple[int, Section]]:
        """The sections that hold tokens start ... stop - 1, and the position of the first token of each."""
        k = bisect_right(self._tokens_before, start) - 1
        while k < len(self.sections) and self._tokens_before[k] < stop:
            yield self._tokens_before[k], self.sections[k]
            k += 1

    def document(self, index: int) -> tuple[int, int]:
        """The positions where a document starts and stops, its eos included."""
        k = bisect_right(self._documents_before, index) - 1
        before, within = self._tokens_before[k], index - self._documents_before[k]
        ends = self.sections[k].ends(max(0, within - 1), within + 1).tolist()
        return before + (ends[0] if within else 0), before + ends[-1]

    def place(self, position: int) -> str:
        """The file that holds a token, and its index there, for messages."""
        k = bisect_right(self._tokens_before, position) - 1
        return f"{self.sections[k].reader.path}, {self.split} token {position - self._tokens_before[k]}"

    def check_ids(self, key: str, n_vocab: int) -> None:
        """Reads all tokens. Raises ConfigError, with the key of the setting, if an id lies outside the vocabulary."""
        for start in range(0, self.n_tokens, _BLOCK):
            tokens = self.read(start, start + _BLOCK)
            if int(tokens.max()) >= n_vocab:
                at = int(np.argmax(tokens >= n_vocab))
                raise ConfigError(f"{key}: {self.place(start + at)}: id {tokens[at]} is outside the vocabulary of {n_vocab}")


def combine_checksums(checksums: Sequence[str]) -> str:
    """The fingerprint of tokens in shards with these checksums."""
    return checksums[0] if len(checksums) == 1 else hashlib.sha256(" ".join(checksums).encode()).hexdigest()


@dataclass(frozen=True)
class TokenSplit:
    """A split of the data: that of each source, in the order of their names."""

    split: Split
    sources: tuple[TokenDataset, ...]
    weights: tuple[float, ...]  # relative frequency of each source's rows in training

    @property
    def n_tokens(self) -> int:
        return sum(source.n_tokens for source in self.sources)

    @property
    def n_documents(self) -> int:
        return sum(source.n_documents for source in self.sources)

    @property
    def n_bytes(self) -> int:
        return sum(source.n_bytes for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Of the tokens; if there are several sources, also of their names and weights."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        return digest([[s.source, weight, s.fingerprint] for s, weight in zip(self.sources, self.weights, strict=True)])

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.sources[0].tokenizer_fingerprint

    def first(self, n: int) -> Integer[np.ndarray, " m"]:
        """The first n tokens, or fewer if there are fewer, of the sources one after another."""
        found = []
        for source in self.sources:
            found.append(source.read(0, n))
            n -= len(found[-1])
        return np.concatenate(found)


@dataclass(frozen=True)
class Corpus:
    """The tokenizer of a run, and the tokens that it trains and is evaluated on."""

    tokenizer: Tokenizer
    splits: dict[Split, TokenSplit]

    @property
    def fingerprints(self) -> dict[str, str]:
        """By name: processes with equal fingerprints have equal tokens."""
        return {"tokenizer": self.tokenizer.fingerprint} | {split: text.fingerprint for split, text in self.splits.items()}
