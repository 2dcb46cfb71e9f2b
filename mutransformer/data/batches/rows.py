"""Rows of T tokens, located by arithmetic: any row of a split can be read without those before it."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from mutransformer.config.data import DataConfig
from mutransformer.data.cache.dataset import TokenDataset
from mutransformer.errors import ConfigError


class Batch(NamedTuple):
    """Rows to predict, each from itself shifted right behind bos: those of one process on the host, or all of them on devices."""

    tokens: Any  # int32 [rows, T]
    mask: Any  # bool [rows, T], the targets that count
    # int32 [rows, T] with data.intra_document_mask=true: which of its row's documents a target belongs to, from 0. Then none is
    # predicted from another document, its first token from bos alone. None: a row is read as one text.
    segments: Any = None


class ConcatRows:
    """Documents joined, each with its eos, and cut. Training omits the incomplete last row; evaluation fills it with eos."""

    def __init__(self, source: TokenDataset, seq_len: int):
        self.source, self._seq_len = source, seq_len
        self.n_eval = -(-source.n_tokens // seq_len)  # rows for evaluation: every token is in one

    def __len__(self) -> int:
        """The number of rows for training, all of them complete."""
        return self.source.n_tokens // self._seq_len

    def span(self, index: int) -> tuple[int, int]:
        """Positions of the source's tokens in a row, T or fewer: start ... stop - 1."""
        return index * self._seq_len, min((index + 1) * self._seq_len, self.source.n_tokens)

    def complete(self, index: int, tokens: Int32[np.ndarray, " T"], begins: Int32[np.ndarray, " T"] | None) -> None:
        """Changes the tokens of a row that was read; writes 1 to `begins` where a document begins after another.

        A document's eos is its last token; the padding of a row counts as a document too.
        """
        if begins is not None:
            start = index * self._seq_len
            begins[self.source.ends_within(start, start + self._seq_len) - start] = 1


class PadRows:
    """One document each with its eos: truncated at T, or filled with eos, of which only the first counts."""

    def __init__(self, source: TokenDataset, seq_len: int, truncated_eos: bool):
        self.source, self._seq_len, self._truncated_eos = source, seq_len, truncated_eos
        self.n_eval = source.n_documents

    def __len__(self) -> int:
        return self.n_eval

    def span(self, index: int) -> tuple[int, int]:
        start, stop = self.source.document(index)
        return start, min(stop, start + self._seq_len)

    def complete(self, index: int, tokens: Int32[np.ndarray, " T"], begins: Int32[np.ndarray, " T"] | None) -> None:
        """With truncated_eos the last token of a row becomes an eos; in a row that is not truncated it is one already."""
        if self._truncated_eos:
            tokens[-1] = self.source.eos_id


Rows = ConcatRows | PadRows


def rows_of(source: TokenDataset, config: DataConfig) -> Rows:
    """The rows of a split with the packing of the config."""
    if config.packing == "pad":
        return PadRows(source, config.seq_len, config.truncated_eos)
    return ConcatRows(source, config.seq_len)


class RowReader:
    """Reads batches of rows of several sources, whose indices follow one another. Can be pickled."""

    def __init__(self, sources: Sequence[Rows], sizes: Sequence[int], config: DataConfig, n_vocab: int):
        """sizes: the number of rows of each source; n_vocab: upper bound of the ids."""
        self._sources, self._seq_len, self._n_vocab = sources, config.seq_len, n_vocab
        self._with_segments = config.intra_document_mask
        self.before: list[int] = [0, *accumulate(sizes)]

    def read(self, indices: Sequence[int]) -> Batch:
        """The rows of these indices; those beyond the last are filled with eos and masked out.

        Raises ConfigError if a row has an id outside the vocabulary.
        """
        # Arrays for the batch, not for each row: a numpy call on a row costs more than its work.
        shape = (len(indices), self._seq_len)
        tokens, mask = np.empty(shape, np.int32), np.ones(shape, np.bool_)
        segments = np.zeros(shape, np.int32) if self._with_segments else None
        for i, index in enumerate(indices):
            rows, within = self._locate(index)
            n = 0
            if rows is not None:
                ids = rows.source.read(*rows.span(within))
                n = len(ids)
                tokens[i, :n] = ids
                rows.complete(within, tokens[i], None if segments is None else segments[i])
            if n < self._seq_len:
                tokens[i, n:] = self._sources[0].source.eos_id
                mask[i, n:] = False
        ids = tokens.view(np.uint32)
        if ids.max() >= self._n_vocab:
            row, column = (int(at[0]) for at in (ids >= self._n_vocab).nonzero())
            rows, within = self._locate(indices[row])
            place = "" if rows is None else rows.source.place(rows.span(within)[0] + column)
            raise ConfigError(f"{place}: id {ids[row, column]} is outside the vocabulary of {self._n_vocab}")
        if segments is not None:
            np.cumsum(segments, axis=1, out=segments)
        return Batch(tokens, mask, segments)

    def _locate(self, index: int) -> tuple[Rows | None, int]:
        k = bisect_right(self.before, index) - 1
        return (self._sources[k] if k < len(self._sources) else None), index - self.before[k]
