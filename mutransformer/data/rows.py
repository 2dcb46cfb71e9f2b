"""Rows of T tokens, found by arithmetic over a split's tokens: any row can be read without those before it."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Integer

from mutransformer.config import ConfigError, DataConfig
from mutransformer.data.shards import Tokens


class Row(NamedTuple):
    """T tokens, which of them count as targets, and where documents are kept apart, which of the row's each belongs to."""

    tokens: Int32[np.ndarray, " T"]
    mask: Bool[np.ndarray, " T"]
    segments: Int32[np.ndarray, " T"] | None = None  # 0, 1, 2, ... along the row


@runtime_checkable
class Rows(Protocol):
    """Random access to the rows of a split. Can be sent to another process.

    Raises:
        ConfigError: on access, if the row has an id outside the vocabulary.
    """

    n_all: int  # for evaluation: every token is in a row

    def __len__(self) -> int:
        """For training: rows that are whole."""
        ...

    def __getitem__(self, index: int) -> Row: ...


def rows_of(tokens: Tokens, config: DataConfig, n_vocab: int) -> Rows:
    """The rows of a split as data.rows says; ids must lie below n_vocab."""
    if config.rows == "pad":
        return PadRows(tokens, config.seq_len, n_vocab, config.truncated_eos)
    return ConcatRows(tokens, config.seq_len, n_vocab, apart=config.documents == "apart")


class ConcatRows:
    """The documents joined, each with its eos, and cut. Where training leaves out the rest, the last row is filled with eos.

    Apart: rows tell their segments, a document's eos in its own. What a row is filled with is a segment too.
    """

    def __init__(self, tokens: Tokens, seq_len: int, n_vocab: int, apart: bool = False):
        self._tokens, self._seq_len, self._n_vocab, self._apart = tokens, seq_len, n_vocab, apart
        self.n_all = -(-tokens.n_tokens // seq_len)

    def __len__(self) -> int:
        return self._tokens.n_tokens // self._seq_len

    def __getitem__(self, index: int) -> Row:
        start, stop = index * self._seq_len, (index + 1) * self._seq_len
        row = _filled(_checked(self._tokens, start, stop, self._n_vocab), self._seq_len, self._tokens.eos_id)
        if not self._apart:
            return row
        begins = np.zeros(self._seq_len, np.int32)
        begins[self._tokens.ends_within(start, stop) - start] = 1
        return Row(row.tokens, row.mask, begins.cumsum(dtype=np.int32))

    def __repr__(self) -> str:
        return f"ConcatRows({self._tokens.source}, {self._tokens.split}, seq_len={self._seq_len})"


class PadRows:
    """A document each, its eos included: cut off at T, or filled up with eos, of which only the first counts."""

    def __init__(self, tokens: Tokens, seq_len: int, n_vocab: int, truncated_eos: bool):
        self._tokens, self._seq_len, self._n_vocab, self._truncated_eos = tokens, seq_len, n_vocab, truncated_eos
        self.n_all = tokens.n_documents

    def __len__(self) -> int:
        return self.n_all

    def __getitem__(self, index: int) -> Row:
        start, stop = self._tokens.document(index)
        row = _filled(
            _checked(self._tokens, start, min(stop, start + self._seq_len), self._n_vocab), self._seq_len, self._tokens.eos_id
        )
        if self._truncated_eos and stop - start > self._seq_len:
            row.tokens[-1] = self._tokens.eos_id
        return row

    def __repr__(self) -> str:
        return f"PadRows({self._tokens.source}, {self._tokens.split}, seq_len={self._seq_len})"


def _checked(tokens: Tokens, start: int, stop: int, n_vocab: int) -> Integer[np.ndarray, " n"]:
    found = tokens.read(start, stop)
    if found.size and found.max() >= n_vocab:
        at = int(np.argmax(found >= n_vocab))
        raise ConfigError(f"{tokens.place(start + at)}: id {found[at]} is outside the vocabulary of {n_vocab}")
    return found


def _filled(found: Integer[np.ndarray, " n"], seq_len: int, eos_id: int) -> Row:
    if len(found) == seq_len:
        return Row(found.astype(np.int32), np.ones(seq_len, np.bool_))
    tokens, mask = np.full(seq_len, eos_id, np.int32), np.zeros(seq_len, np.bool_)
    tokens[: len(found)] = found
    mask[: len(found)] = True
    return Row(tokens, mask)


def loss_mask(tokens: Int32[np.ndarray, "rows T"], eos_id: int, pad_id: int) -> Bool[np.ndarray, "rows T"]:
    """The targets that count where a row holds one document: up to and including its first eos or pad."""
    ends = (tokens == eos_id) | (tokens == pad_id)
    return np.cumsum(ends, axis=1) - ends == 0
