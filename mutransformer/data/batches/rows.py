"""Rows of T tokens, found by arithmetic over a split's tokens: any row can be read without those before it."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Optional, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from mutransformer.config.data import DataConfig
from mutransformer.data.batches.batch import Batch
from mutransformer.data.cache.shards import Tokens
from mutransformer.errors import ConfigError


@runtime_checkable
class Rows(Protocol):
    """The rows of a split of a source. Can be sent to another process."""

    source: Tokens
    n_all: int  # for evaluation: every token is in a row

    def __len__(self) -> int:
        """For training: rows that are whole."""
        ...

    def span(self, index: int) -> tuple[int, int]:
        """Which of the source's tokens a row holds, T or less: start ... stop - 1."""
        ...

    def finish(self, index: int, tokens: Int32[np.ndarray, " T"], begins: Optional[Int32[np.ndarray, " T"]]) -> None:
        """Changes a row that holds its tokens; if begins is given, writes 1 there where a document begins behind another."""
        ...


def rows_of(source: Tokens, config: DataConfig) -> Rows:
    """The rows of a split as data.packing says."""
    if config.packing == "pad":
        return PadRows(source, config.seq_len, config.truncated_eos)
    return ConcatRows(source, config.seq_len)


class ConcatRows:
    """The documents joined, each with its eos, and cut. Where training leaves out the rest, the last row is filled with eos."""

    def __init__(self, source: Tokens, seq_len: int):
        self.source, self._seq_len = source, seq_len
        self.n_all = -(-source.n_tokens // seq_len)

    def __len__(self) -> int:
        return self.source.n_tokens // self._seq_len

    def span(self, index: int) -> tuple[int, int]:
        return index * self._seq_len, min((index + 1) * self._seq_len, self.source.n_tokens)

    def finish(self, index: int, tokens: Int32[np.ndarray, " T"], begins: Optional[Int32[np.ndarray, " T"]]) -> None:
        """A document's eos is the last of its own; what a row is filled with begins a document too."""
        if begins is not None:
            start = index * self._seq_len
            begins[self.source.ends_within(start, start + self._seq_len) - start] = 1

    def __repr__(self) -> str:
        return f"ConcatRows({self.source.source}, {self.source.split}, seq_len={self._seq_len})"


class PadRows:
    """A document each, its eos included: cut off at T, or filled up with eos, of which only the first counts."""

    def __init__(self, source: Tokens, seq_len: int, truncated_eos: bool):
        self.source, self._seq_len, self._truncated_eos = source, seq_len, truncated_eos
        self.n_all = source.n_documents

    def __len__(self) -> int:
        return self.n_all

    def span(self, index: int) -> tuple[int, int]:
        start, stop = self.source.document(index)
        return start, min(stop, start + self._seq_len)

    def finish(self, index: int, tokens: Int32[np.ndarray, " T"], begins: Optional[Int32[np.ndarray, " T"]]) -> None:
        """The last token of a row becomes an eos with truncated_eos: one that is not cut off has no other there."""
        if self._truncated_eos:
            tokens[-1] = self.source.eos_id

    def __repr__(self) -> str:
        return f"PadRows({self.source.source}, {self.source.split}, seq_len={self._seq_len})"


class Table:
    """Rows of several sources, counted on from one to the next, and read a batch at a time. Can be sent to another process."""

    def __init__(self, sources: Sequence[Rows], sizes: Sequence[int], config: DataConfig, n_vocab: int):
        """sizes: how many rows of each source; n_vocab: ids must lie below."""
        self._sources, self._seq_len, self._n_vocab = sources, config.seq_len, n_vocab
        self._apart = config.intra_document_mask
        self.before: list[int] = [0, *accumulate(sizes)]

    def read(self, indices: Sequence[int]) -> Batch:
        """The rows of these indices; those beyond the last are filled with eos, of which none counts.

        Raises:
            ConfigError: a row has an id outside the vocabulary.
        """
        # Into arrays of a batch: what numpy does for a row takes longer to call than to do.
        shape = (len(indices), self._seq_len)
        tokens, mask = np.empty(shape, np.int32), np.ones(shape, np.bool_)
        segments = np.zeros(shape, np.int32) if self._apart else None
        for i, index in enumerate(indices):
            rows, within = self._place(index)
            n = 0
            if rows is not None:
                found = rows.source.read(*rows.span(within))
                n = len(found)
                tokens[i, :n] = found
                rows.finish(within, tokens[i], None if segments is None else segments[i])
            if n < self._seq_len:
                tokens[i, n:] = self._sources[0].source.eos_id
                mask[i, n:] = False
        if tokens.view(np.uint32).max() >= self._n_vocab:
            raise self._outside(indices, tokens.view(np.uint32))
        if segments is not None:
            np.cumsum(segments, axis=1, out=segments)
        return Batch(tokens, mask, segments)

    def _place(self, index: int) -> tuple[Optional[Rows], int]:
        k = bisect_right(self.before, index) - 1
        return (self._sources[k] if k < len(self._sources) else None), index - self.before[k]

    def _outside(self, indices: Sequence[int], tokens: np.ndarray) -> ConfigError:
        row, column = (int(found[0]) for found in (tokens >= self._n_vocab).nonzero())
        rows, within = self._place(indices[row])
        place = "" if rows is None else rows.source.place(rows.span(within)[0] + column)
        return ConfigError(f"{place}: id {tokens[row, column]} is outside the vocabulary of {self._n_vocab}")


def loss_mask(tokens: Int32[np.ndarray, "rows T"], eos_id: int, pad_id: int) -> Bool[np.ndarray, "rows T"]:
    """The targets that count where a row holds one document: up to and including its first eos or pad."""
    ends = (tokens == eos_id) | (tokens == pad_id)
    return np.cumsum(ends, axis=1) - ends == 0
