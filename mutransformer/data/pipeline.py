"""Batches of rows of tokens, by Grain for training and in file order for evaluation.

The order is defined on global rows: with any number of processes, their batches joined in order are the same global batch.
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import grain
import numpy as np
from jaxtyping import Bool, Int32, Integer

from mutransformer.config import ConfigError, DataConfig, check
from mutransformer.data.corpus import TokenFile


class Batch(NamedTuple):
    """Rows to predict, each from itself shifted right behind bos: those of one process on the host, or all of them on devices.

    Attributes:
        tokens: int32 [rows, T].
        mask: bool [rows, T], the targets that count.
    """

    tokens: Any
    mask: Any


class Rows:
    """Random access to a token file as rows of T tokens. Tokens after the last whole row are left out.

    Raises:
        ConfigError: on access, if the row has an id outside the vocabulary.
    """

    def __init__(self, tokens: TokenFile, seq_len: int, n_vocab: int):
        self._tokens, self._seq_len, self._n_vocab = tokens, seq_len, n_vocab

    def __len__(self) -> int:
        return self._tokens.n_tokens // self._seq_len

    def __getitem__(self, index: int) -> Int32[np.ndarray, " T"]:
        return _row(self._tokens, index, self._seq_len, self._n_vocab)

    def __repr__(self) -> str:
        return f"Rows({self._tokens.path}, seq_len={self._seq_len})"


def train_batches(
    tokens: TokenFile, config: DataConfig, seed: int, n_process: int, process: int, n_vocab: int
) -> grain.DatasetIterator[Batch]:
    """Batches without end: every epoch has each whole row once, in an order of its own.

    Rows run on over epochs, so a batch may hold rows of two. The iterator's get_state() and set_state() take {"next_index": k},
    k the number of batches drawn; what else decides the sequence is in fingerprint(). close() ends its threads.

    Args:
        tokens: the split to train on.
        config: seq_len T, batch_size B over all processes, threads and prefetch.
        seed: of the order, in 0 ... 2^32 - 1.
        n_process: processes of the run; each gets B / n_process rows of every batch.
        process: the index of this one.
        n_vocab: ids must lie below.

    Raises:
        ConfigError: the split has fewer rows than a batch, or the batch does not divide among the processes.
        ConfigError: from next(), a token id lies outside the vocabulary.
    """
    rows_here = _rows_here(config, n_process, process)
    rows = Rows(tokens, config.seq_len, n_vocab)
    check(
        len(rows) >= config.batch_size,
        f"data.batch_size = {config.batch_size}, data.seq_len = {config.seq_len}: the {tokens.split} split has "
        f"{tokens.n_tokens} tokens, a batch needs {config.batch_size * config.seq_len}; lower either, or add text",
    )
    shuffled = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()

    def batch(k: int) -> Batch:
        first = k * config.batch_size + process * rows_here
        drawn = [shuffled[i] for i in range(first, first + rows_here)]
        stacked = np.stack(drawn)  # pyright: ignore[reportCallIssue, reportArgumentType]  # no row is None: none is filtered
        return Batch(stacked, np.ones_like(stacked, dtype=np.bool_))

    batches = grain.MapDataset.range(sys.maxsize // config.batch_size).map(batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)))


def eval_batches(
    tokens: TokenFile, config: DataConfig, n_batches: Optional[int], n_process: int, process: int, n_vocab: int
) -> Iterator[Batch]:
    """n_batches batches of rows evenly spread over the split, or all rows: then every token counts in exactly one batch.

    Always the same rows. All batches have the same shape: beyond the end of the split rows are filled with its last token, an
    eos, and masked out. A split with less than n_batches gives what it has, at least one; every process gets the same number.

    Args:
        tokens: the split to evaluate on.
        config: seq_len T and batch_size B over all processes.
        n_batches: None for the whole split.
        n_process: processes of the run; each gets B / n_process rows of every batch.
        process: the index of this one.
        n_vocab: ids must lie below.

    Raises:
        ConfigError: the split has no token, or the batch does not divide among the processes.
        ConfigError: from next(), a token id lies outside the vocabulary.
    """
    rows_here = _rows_here(config, n_process, process)
    check(tokens.n_tokens > 0, f"data: the {tokens.split} split has no tokens")
    n_rows = -(-tokens.n_tokens // config.seq_len)
    in_split = -(-n_rows // config.batch_size)
    n = in_split if n_batches is None else min(n_batches, in_split)
    every = 1.0 if n == in_split else n_rows / (n * config.batch_size)
    first_rows = range(process * rows_here, n * config.batch_size, config.batch_size)
    return (
        _eval_batch(tokens, [int(at * every) for at in range(first, first + rows_here)], config.seq_len, n_vocab)
        for first in first_rows
    )


def loss_mask(tokens: Int32[np.ndarray, "rows T"], eos_id: int, pad_id: int) -> Bool[np.ndarray, "rows T"]:
    """The targets that count where a row holds one document: up to and including its first eos or pad."""
    ends = (tokens == eos_id) | (tokens == pad_id)
    return np.cumsum(ends, axis=1) - ends == 0


def fingerprint(tokens: TokenFile, config: DataConfig, seed: int) -> dict[str, Any]:
    """What decides the sequence of training batches beside their number: to be saved with a checkpoint, and compared."""
    return {
        "tokens": tokens.fingerprint,
        "tokenizer": tokens.tokenizer_fingerprint,
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "seed": seed,
    }


def _rows_here(config: DataConfig, n_process: int, process: int) -> int:
    assert 0 <= process < n_process
    check(
        config.batch_size % n_process == 0,
        f"data.batch_size = {config.batch_size}: must be a multiple of the number of processes, {n_process}",
    )
    return config.batch_size // n_process


def _row(tokens: TokenFile, index: int, seq_len: int, n_vocab: int) -> Int32[np.ndarray, " t"]:
    """Row `index`; shorter than seq_len, or empty, at the end of the split."""
    row: Integer[np.ndarray, " t"] = tokens.tokens[index * seq_len : (index + 1) * seq_len]
    if row.size and not (0 <= row.min() and row.max() < n_vocab):
        wrong = row[(row < 0) | (row >= n_vocab)][0]
        raise ConfigError(f"{tokens.path}, row {index}: token id {wrong} is outside the vocabulary of {n_vocab}")
    return row.astype(np.int32)


def _eval_batch(tokens: TokenFile, rows: list[int], seq_len: int, n_vocab: int) -> Batch:
    batch = Batch(
        np.full((len(rows), seq_len), tokens.tokens[-1], np.int32),
        np.zeros((len(rows), seq_len), np.bool_),
    )
    for at, index in enumerate(rows):
        row = _row(tokens, index, seq_len, n_vocab)
        batch.tokens[at, : len(row)] = row
        batch.mask[at, : len(row)] = True
    return batch
