"""Batches of rows of tokens: shuffled and mixed by Grain for training, in order for evaluation.

Shuffling and mixing are defined on global rows: batch k holds the same rows with any number of processes, devices, threads and
workers, and after any restart.
"""

import hashlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

import grain
from absl import flags

from mutransformer.config.data import DataConfig
from mutransformer.data.batches.rows import Batch, RowReader, rows_of
from mutransformer.data.cache.dataset import TokenSplit
from mutransformer.data.workers import call_without_signals, set_up_worker
from mutransformer.errors import ConfigError, check

_PATIENCE = 4.0  # seconds that processes are given to end, before and after they are killed


class Batches(Iterator[Batch]):
    """An endless iterator of batches. close() ends the threads or processes that read ahead."""

    def __init__(self, batches: grain.MapDataset[Batch], config: DataConfig, rows: Callable[[int], list[int]]):
        """rows: the global indices of the rows of batch k."""
        self._batches, self._config, self.rows = batches, config, rows
        self._next = 0
        self._iterator: grain.DatasetIterator[Batch] | None = None
        self._workers: list[BaseProcess] = []

    def __next__(self) -> Batch:
        try:
            batch = next(self._iterator) if self._iterator else self._first()
        except RuntimeError as error:
            if not (self._config.workers and "terminated unexpectedly" in str(error)):
                raise
            killed = "a process that reads ahead was killed, perhaps for memory"
            raise ConfigError(f"data.workers = {self._config.workers}: {killed}") from error
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """{"next_index": k} after k batches. Everything else that determines the sequence is in fingerprint()."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at that index, with whatever number of threads, workers and processes."""
        self.close()
        self._next = state["next_index"]

    def close(self) -> None:
        """Ends the threads or processes that read ahead; those that do not end in time, such as a stopped one, are killed."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        if not self._config.workers:
            iterator.close()
            return
        # In a thread: Grain waits for ever for the rest of what a stopped process has sent in part.
        closing = Thread(target=iterator.close, daemon=True)
        closing.start()
        closing.join(_PATIENCE)
        if closing.is_alive():
            for worker in self._workers:
                worker.kill()
            closing.join(_PATIENCE)
        self._workers = []

    def _first(self) -> Batch:
        """Starts to read ahead, and returns the first batch."""

        def start() -> Batch:
            self._iterator = iterator = self._start()
            return next(iterator)

        if not self._config.workers:
            return start()
        before = multiprocessing.active_children()
        try:
            return call_without_signals(start)
        finally:
            started = [child for child in multiprocessing.active_children() if child not in before]
            self._workers = [child for child in started if child.name.startswith("grain-")]

    def _start(self) -> grain.DatasetIterator[Batch]:
        c = self._config
        ahead = grain.ReadOptions(num_threads=c.threads, prefetch_buffer_size=c.prefetch)
        batches = self._batches[self._next :].to_iter_dataset(ahead)
        if c.workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only an absl program parses
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=c.workers, per_worker_buffer_size=max(1, c.prefetch))
            batches = batches.mp_prefetch(workers, _set_up_worker)
        return iter(batches)


def _set_up_worker(index: int, count: int) -> None:
    set_up_worker()


def train_batches(text: TokenSplit, config: DataConfig, seed: int, n_blocks: int, blocks: Sequence[int], n_vocab: int) -> Batches:
    """An endless iterator: every epoch of a source has each of its complete rows once, in a new order by seed, 0 ... 2^32 - 1.

    A batch may hold rows of two epochs. Its data.batch_size rows are divided into n_blocks equal blocks; this process reads those
    in `blocks`, from mesh.data_share. n_vocab is an upper bound of the token ids.

    Raises ConfigError if the split has fewer rows than a batch, a source has none, or the batch does not divide into the blocks;
    and from next() if a token id lies outside the vocabulary.
    """
    local_rows = _local_rows(config, n_blocks, blocks)
    sources = {tokens.source: rows_of(tokens, config) for tokens in text.sources}
    size, enough = config.batch_size, sum(map(len, sources.values())) >= config.batch_size
    what = f"data.batch_size = {size}, data.seq_len = {config.seq_len}: the {text.split} split has"
    if config.packing == "pad":
        check(enough, f"{what} {text.n_documents} documents, a batch needs {size}; add text")
    check(enough, f"{what} {text.n_tokens} tokens, a batch needs {size * config.seq_len}; lower either, or add text")
    empty = [name for name, rows in sources.items() if not len(rows)]
    check(not empty, f"data.sources.{''.join(empty[:1])}: its {text.split} split has not even one row; leave it out, or add text")
    # Grain passes indices and not rows: its bookkeeping for an element takes longer than reading a row.
    reader = RowReader(list(sources.values()), [len(rows) for rows in sources.values()], config, n_vocab)
    shuffled = [
        grain.MapDataset.range(first, stop).seed(_seed(seed, name, len(sources))).shuffle().repeat()
        for name, first, stop in zip(sources, reader.before[:-1], reader.before[1:], strict=True)
    ]
    mixed = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, text.weights)
    read = _ReadBatch(reader, mixed, size, local_rows)
    return Batches(grain.MapDataset.range(sys.maxsize // size).map(read), config, read.rows)


class _ReadBatch:
    """The rows of batch k that belong to this process. A class, since it is pickled for worker processes."""

    def __init__(self, reader: RowReader, order: Any, batch_size: int, local_rows: list[int]):
        self._reader, self._order, self._batch_size, self._local_rows = reader, order, batch_size, local_rows

    def __call__(self, k: int) -> Batch:
        first = k * self._batch_size
        return self._reader.read([self._order[first + i] for i in self._local_rows])

    def rows(self, k: int) -> list[int]:
        """The indices of all rows of batch k, those of other processes too: of the sources' rows, one source after another."""
        return [int(self._order[k * self._batch_size + i]) for i in range(self._batch_size)]


def _seed(seed: int, name: str, n_sources: int) -> int:
    """The seed of a source's order, which does not depend on the other sources of a mixture."""
    return seed if n_sources == 1 else int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def eval_batches(
    text: TokenSplit, config: DataConfig, n_batches: int | None, n_blocks: int, blocks: Sequence[int], n_vocab: int
) -> Iterator[Batch]:
    """n_batches batches of rows evenly spread over the split; of all rows if it is None: then every token counts in one batch.

    Always the same rows, source after source. All batches have the same shape: rows beyond the end of the split are filled with
    eos and masked out. A split with fewer batches gives those it has, at least one; every process gets the same number. With
    packing=pad tokens that are truncated do not count. The rest is as for train_batches().

    Raises ConfigError if the split has no token, or the batch does not divide into the blocks; and from next() as there.
    """
    local_rows = _local_rows(config, n_blocks, blocks)
    check(text.n_tokens > 0, f"data: the {text.split} split has no tokens; raise data.{text.split}_fraction, or add text")
    sources = [rows_of(tokens, config) for tokens in text.sources]
    reader = RowReader(sources, [rows.n_eval for rows in sources], config, n_vocab)
    n_rows = reader.before[-1]
    in_split = -(-n_rows // config.batch_size)
    n = in_split if n_batches is None else min(n_batches, in_split)
    every = 1.0 if n == in_split else n_rows / (n * config.batch_size)
    first_rows = range(0, n * config.batch_size, config.batch_size)
    return (reader.read([int((first + i) * every) for i in local_rows]) for first in first_rows)


def _local_rows(config: DataConfig, n_blocks: int, blocks: Sequence[int]) -> list[int]:
    """The indices 0 ... B - 1 of a batch's rows that are in the blocks."""
    assert blocks and all(0 <= block < n_blocks for block in blocks)
    check(config.batch_size % n_blocks == 0, f"data.batch_size = {config.batch_size}: must be a multiple of mesh.x, {n_blocks}")
    size = config.batch_size // n_blocks
    return [i for block in blocks for i in range(block * size, (block + 1) * size)]


def fingerprint(text: TokenSplit, config: DataConfig, seed: int) -> dict[str, Any]:
    """What determines the sequence of training batches: saved with a checkpoint, and compared when it is resumed."""
    keys = ("packing", "intra_document_mask", "truncated_eos", "seq_len", "batch_size")
    settings = {key: getattr(config, key) for key in keys}
    return {"tokens": text.fingerprint, "tokenizer": text.tokenizer_fingerprint, **settings, "seed": seed}
