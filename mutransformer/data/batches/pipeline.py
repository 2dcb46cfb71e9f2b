"""Batches of rows of tokens, by Grain for training and in order for evaluation.

Shuffling and mixing are defined on global rows: with any number of processes, devices, threads and workers, and after any
restart, batch k holds the same rows.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import grain
from absl import flags

from mutransformer.config.data import DataConfig
from mutransformer.data.batches.batch import Batch
from mutransformer.data.batches.rows import Table, rows_of
from mutransformer.data.cache.prepare import Mixture
from mutransformer.errors import ConfigError, check


class Batches(Iterator[Batch]):
    """Batches without end. close() ends the threads or processes that read ahead."""

    def __init__(self, batches: grain.MapDataset[Batch], config: DataConfig):
        self._batches, self._config = batches, config
        self._next = 0
        self._ahead: Optional[grain.DatasetIterator[Batch]] = None

    def __next__(self) -> Batch:
        self._ahead = self._ahead or self._start()
        try:
            batch = next(self._ahead)
        except RuntimeError as error:
            if not (self._config.workers and "terminated unexpectedly" in str(error)):
                raise
            told = f"data.workers = {self._config.workers}: a process that reads ahead was killed, for memory?"
            raise ConfigError(told) from error
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """{"next_index": k}, k the number of batches drawn. What else decides the sequence is in fingerprint()."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from there, whatever number of threads, workers and processes drew the batches before."""
        self.close()
        self._next = state["next_index"]

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _start(self) -> grain.DatasetIterator[Batch]:
        c = self._config
        options = grain.ReadOptions(num_threads=c.threads, prefetch_buffer_size=c.prefetch)
        batches = self._batches[self._next :].to_iter_dataset(options)
        if c.workers:
            if not flags.FLAGS.is_parsed():  # Grain asks for flags that only a program of absl's parses
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=c.workers, per_worker_buffer_size=max(1, c.prefetch))
            )
        return iter(batches)


def train_batches(text: Mixture, config: DataConfig, seed: int, n_blocks: int, blocks: Sequence[int], n_vocab: int) -> Batches:
    """Batches without end: every epoch of a source has each of its whole rows once, in an order of its own.

    Rows run on over epochs, so a batch may hold rows of two.

    Args:
        text: the split to train on.
        config: seq_len T, batch_size B over all processes, rows, threads, workers and prefetch.
        seed: of the order, in 0 ... 2^32 - 1.
        n_blocks: equal blocks of rows that a batch is read in.
        blocks: those of this process, as of mesh.data_share.
        n_vocab: ids must lie below.

    Raises:
        ConfigError: the split has fewer rows than a batch, a source has none, or the batch does not divide into the blocks.
        ConfigError: from next(), a token id lies outside the vocabulary.
    """
    rows_here = _rows_here(config, n_blocks, blocks)
    sources = {tokens.source: rows_of(tokens, config) for tokens in text.sources}
    what = f"data.batch_size = {config.batch_size}, data.seq_len = {config.seq_len}: the {text.split} split"
    check(
        sum(map(len, sources.values())) >= config.batch_size,
        f"{what} has {text.n_documents} documents, a batch needs {config.batch_size}; add text"
        if config.packing == "pad"
        else f"{what} has {text.n_tokens} tokens, a batch needs {config.batch_size * config.seq_len}; lower either, or add text",
    )
    empty = [name for name, rows in sources.items() if not len(rows)]
    check(not empty, f"data.sources.{''.join(empty[:1])}: its {text.split} split has not even one row; leave it out, or add text")
    # Of indices and not of rows: what Grain tells of each element it passes on takes longer than to read a row.
    table = Table(list(sources.values()), [len(rows) for rows in sources.values()], config, n_vocab)
    shuffled = [
        grain.MapDataset.range(first, stop).seed(_seed(seed, name, len(sources))).shuffle().repeat()
        for name, first, stop in zip(sources, table.before[:-1], table.before[1:], strict=True)
    ]
    mixed = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, text.weights)
    draw = _Draw(table, mixed, config.batch_size, rows_here)
    return Batches(grain.MapDataset.range(sys.maxsize // config.batch_size).map(draw), config)


class _Draw:
    """Batch k of global rows, the rows of one process. A class, since worker processes are sent it."""

    def __init__(self, table: Table, order: Any, batch_size: int, here: list[int]):
        self._table, self._order, self._batch_size, self._here = table, order, batch_size, here

    def __call__(self, k: int) -> Batch:
        first = k * self._batch_size
        return self._table.read([self._order[first + i] for i in self._here])


def eval_batches(
    text: Mixture, config: DataConfig, n_batches: Optional[int], n_blocks: int, blocks: Sequence[int], n_vocab: int
) -> Iterator[Batch]:
    """n_batches batches of rows evenly spread over the split, or all rows: then every token counts in exactly one batch.

    Always the same rows, the sources' one after another. All batches have the same shape: beyond the end of the split rows are
    filled with eos and masked out. A split with less than n_batches gives what it has, at least one; every process gets the same
    number. With packing=pad only what is within the rows counts.

    Args:
        text: the split to evaluate on.
        config: seq_len T and batch_size B over all processes, rows.
        n_batches: None for the whole split.
        n_blocks: equal blocks of rows that a batch is read in.
        blocks: those of this process, as of mesh.data_share.
        n_vocab: ids must lie below.

    Raises:
        ConfigError: the split has no token, or the batch does not divide into the blocks.
        ConfigError: from next(), a token id lies outside the vocabulary.
    """
    rows_here = _rows_here(config, n_blocks, blocks)
    check(text.n_tokens > 0, f"data: the {text.split} split has no tokens; raise data.{text.split}_share, or add text")
    sources = [rows_of(tokens, config) for tokens in text.sources]
    table = Table(sources, [rows.n_all for rows in sources], config, n_vocab)
    n_rows = table.before[-1]
    in_split = -(-n_rows // config.batch_size)
    n = in_split if n_batches is None else min(n_batches, in_split)
    every = 1.0 if n == in_split else n_rows / (n * config.batch_size)
    first_rows = range(0, n * config.batch_size, config.batch_size)
    return (table.read([int((first + i) * every) for i in rows_here]) for first in first_rows)


def fingerprint(text: Mixture, config: DataConfig, seed: int) -> dict[str, Any]:
    """What decides the sequence of training batches beside their number: to be saved with a checkpoint, and compared."""
    return {
        "tokens": text.fingerprint,
        "tokenizer": text.tokenizer_fingerprint,
        "packing": config.packing,
        "intra_document_mask": config.intra_document_mask,
        "truncated_eos": config.truncated_eos,
        "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        "seed": seed,
    }


def _seed(seed: int, name: str, n_sources: int) -> int:
    """Of a source's order: its own, that it keeps when others come and go."""
    return seed if n_sources == 1 else int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def _rows_here(config: DataConfig, n_blocks: int, blocks: Sequence[int]) -> list[int]:
    """Of a batch's rows 0 ... B - 1 those in the blocks."""
    assert blocks and all(0 <= block < n_blocks for block in blocks)
    check(
        config.batch_size % n_blocks == 0,
        f"data.batch_size = {config.batch_size}: must be a multiple of mesh.x, {n_blocks}",
    )
    size = config.batch_size // n_blocks
    return [i for block in blocks for i in range(block * size, (block + 1) * size)]
