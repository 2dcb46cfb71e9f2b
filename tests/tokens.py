"""Splits made of given tokens, as shards on the disk."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from mutransformer.config.data import DataConfig
from mutransformer.data.batches.rows import Batch, RowReader, Rows
from mutransformer.data.cache.dataset import ShardWriter, TokenDataset, TokenSplit, combine_checksums, open_shard

EOS = 999
_FOLDER = tempfile.TemporaryDirectory()


def source(documents: list[list[int]], n_shards: int = 1, name: str = "data", n_bytes: int = 0) -> TokenDataset:
    """The train split of a source: tokens as given, in n_shards about equal shards."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    opened, hashes = [], []
    for k in range(n_shards):
        path = folder / (f"{k}.shard" if n_shards > 1 else "shard")
        writer = ShardWriter(path, "<u2")
        for document in documents[k * len(documents) // n_shards : (k + 1) * len(documents) // n_shards]:
            writer.add("train", [np.array(document, np.int32)], n_bytes, ends=True)
        facts: dict[str, Any] = writer.finish()
        opened.append(open_shard(path, "<u2", facts)["train"])
        hashes.append(facts["train"]["sha256"])
    return TokenDataset(name, "train", tuple(opened), n_bytes, combine_checksums(hashes), "tokenizer", EOS)


def mixture(documents: list[list[int]], n_bytes: int = 0) -> TokenSplit:
    """Of one source."""
    return TokenSplit("train", (source(documents, n_bytes=n_bytes),), (1.0,))


def whole_row(rows: Rows, index: int, seq_len: int, apart: bool = False) -> Batch:
    """One row, without the axis of rows."""
    config = DataConfig(seq_len=seq_len, intra_document_mask=apart)
    batch = RowReader([rows], [rows.n_eval], config, n_vocab=1 << 30).read([index])
    return Batch(*(None if array is None else array[0] for array in batch))


def loss_mask(tokens: Int32[np.ndarray, "rows T"], eos_id: int, pad_id: int) -> Bool[np.ndarray, "rows T"]:
    """The targets that count in rows of one document: up to and including the first eos or pad."""
    ends = (tokens == eos_id) | (tokens == pad_id)
    return np.cumsum(ends, axis=1) - ends == 0
