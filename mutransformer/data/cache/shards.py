"""Shards: the tokens of some documents in a file, by split, with the place where each document ends; and splits over many shards.

A file holds the tokens of train, validation and test, zeros up to a multiple of 8 bytes, and for the documents of each split in
the same order, as 64-bit numbers, the count of the split's tokens up to and including theirs. All numbers are little-endian.
"""

import hashlib
import os
import shutil
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from mutransformer.data.sources.readers import SPLITS, Split

_BLOCK = 1 << 20  # tokens or documents looked at together
_STRIDE = 128  # documents
_HELD = 8 << 20  # bytes of a split that wait in memory


def dtype_for(n_vocab: int) -> str:
    """The narrowest type that holds every id."""
    return "<u2" if n_vocab <= 1 << 16 else "<u4"


class Writer:
    """Writes a shard, document by document. The tokens of train go to its file, what is to follow them is kept beside it."""

    def __init__(self, path: Path, dtype: str):
        self._file = open(path, "wb")
        self._dtype = np.dtype(dtype)
        self._held = {split: SpooledTemporaryFile(_HELD, dir=str(path.parent)) for split in SPLITS if split != "train"}
        self._hash = {split: hashlib.sha256() for split in SPLITS}
        self._ends = {split: array("Q") for split in SPLITS}
        self._counts = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
        self._pending: dict[Split, list[Integer[np.ndarray, " _"]]] = {split: [] for split in SPLITS}
        self._n_pending = 0

    def add(self, split: Split, tokens: Sequence[Integer[np.ndarray, " _"]], n_bytes: int, ends: bool) -> None:
        """Adds tokens to the split's last document, and ends it if so told."""
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
            if split == "train":
                self._file.write(data)
            else:
                self._held[split].write(data)
            pending.clear()
        self._n_pending = 0

    def finish(self) -> dict[str, Any]:
        """Completes the file. Returns its counts and the hashes of tokens by split."""
        self._write()
        with self._file:
            for held in self._held.values():
                with held:
                    held.seek(0)
                    shutil.copyfileobj(held, self._file, 1 << 20)
            self._file.write(bytes(-self._file.tell() % 8))
            for ends in self._ends.values():
                self._file.write(np.array(ends, "<u8").tobytes())
        return {split: self._counts[split] | {"sha256": self._hash[split].hexdigest()} for split in SPLITS}

    def close(self) -> None:
        for file in (self._file, *self._held.values()):
            file.close()


class _Reader:
    """A file read at any place by any thread. Can be sent to another process.

    Reads instead of mapping: a fault in a mapped page holds up all Python threads, and its pages count as this process's memory.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def __reduce__(self) -> Any:
        return _Reader, (self.path,)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, n: int, offset: int) -> bytes:
        data = os.pread(self._descriptor, n, offset)
        if len(data) != n:
            raise OSError(None, "is shorter than it was", str(self.path))
        return data


@dataclass(frozen=True)
class Section:
    """The part of a shard that belongs to one split."""

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
        """Every _STRIDE-th document's end: finds the others by one short read, and is small."""
        blocks = range(0, self.n_documents, _BLOCK)
        found = (self.ends(k, min(k + _BLOCK, self.n_documents))[_STRIDE - 1 :: _STRIDE] for k in blocks)
        return array("q", b"".join(ends.astype(np.int64).tobytes() for ends in found))

    def ends_within(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Where documents end behind token start and before token stop."""
        first, last = (_STRIDE * bisect_left(self._some_ends, at) for at in (start, stop))
        ends = self.ends(first, min(last + _STRIDE, self.n_documents))
        return ends[ends.searchsorted(start, "right") : ends.searchsorted(stop)]


def sections(path: Path, dtype: str, facts: dict[str, Any]) -> dict[Split, Section]:
    """The splits in a shard whose writer told these facts."""
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
class Tokens:
    """The tokens of a split of a source: its documents in order, an eos after each. Can be sent to another process."""

    source: str
    split: Split
    sections: tuple[Section, ...]
    n_bytes: int  # of the text in UTF-8, for a loss in bits per byte
    fingerprint: str  # SHA-256 of the tokens; of the shards' hashes where there are several
    tokenizer_fingerprint: str
    eos_id: int
    _tokens_before: list[int] = field(init=False)  # of each section and of the end
    _documents_before: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tokens_before", [0, *accumulate(s.n_tokens for s in self.sections)])
        object.__setattr__(self, "_documents_before", [0, *accumulate(s.n_documents for s in self.sections)])

    @property
    def n_tokens(self) -> int:
        return self._tokens_before[-1]

    @property
    def n_documents(self) -> int:
        return self._documents_before[-1]

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """Tokens start ... stop - 1, or what there is of them."""
        stop = min(stop, self.n_tokens)
        k = bisect_right(self._tokens_before, start) - 1
        pieces = []
        while start < stop:
            first, end = self._tokens_before[k : k + 2]
            until = min(stop, end)
            if until > start:
                pieces.append(self.sections[k].tokens(start - first, until - first))
                start = until
            k += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint16), *pieces])

    def ends_within(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Where documents end behind token start and before token stop."""
        k = bisect_right(self._tokens_before, start) - 1
        found = []
        while k < len(self.sections) and (first := self._tokens_before[k]) < stop:
            found.append(first + self.sections[k].ends_within(max(0, start - first), stop - first))
            k += 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def document(self, index: int) -> tuple[int, int]:
        """Where a document's tokens start and stop, its eos included."""
        k = bisect_right(self._documents_before, index) - 1
        before, within = self._tokens_before[k], index - self._documents_before[k]
        ends = self.sections[k].ends(max(0, within - 1), within + 1).tolist()
        return before + (ends[0] if within else 0), before + ends[-1]

    def place(self, position: int) -> str:
        """The file that holds a token, for messages."""
        k = bisect_right(self._tokens_before, position) - 1
        return f"{self.sections[k].reader.path}, {self.split} token {position - self._tokens_before[k]}"


def first_outside(section: Section, n_vocab: int) -> tuple[int, int] | None:
    """The index and id of the first token that is outside the vocabulary; None if there is none."""
    for start in range(0, section.n_tokens, _BLOCK):
        tokens = section.tokens(start, min(start + _BLOCK, section.n_tokens))
        if int(tokens.max()) >= n_vocab:
            at = int(np.argmax(tokens >= n_vocab))
            return start + at, int(tokens[at])
    return None


def join(hashes: Sequence[str]) -> str:
    """The fingerprint of tokens that lie in shards with these hashes."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
