"""Splits made of given tokens, as shards on the disk."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mutransformer.config.data import DataConfig
from mutransformer.data.batches.batch import Batch
from mutransformer.data.batches.rows import Rows, Table
from mutransformer.data.cache.prepare import Mixture
from mutransformer.data.cache.shards import Tokens, Writer, join, sections

EOS = 999
_FOLDER = tempfile.TemporaryDirectory()


def source(documents: list[list[int]], n_shards: int = 1, name: str = "data", n_bytes: int = 0) -> Tokens:
    """The train split of a source: tokens as given, in n_shards about equal shards."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    opened, hashes = [], []
    for k in range(n_shards):
        path = folder / (f"{k}.shard" if n_shards > 1 else "shard")
        writer = Writer(path, "<u2")
        for document in documents[k * len(documents) // n_shards : (k + 1) * len(documents) // n_shards]:
            writer.add("train", [np.array(document, np.int32)], n_bytes, ends=True)
        facts: dict[str, Any] = writer.finish()
        opened.append(sections(path, "<u2", facts)["train"])
        hashes.append(facts["train"]["sha256"])
    return Tokens(name, "train", tuple(opened), n_bytes, join(hashes), "tokenizer", EOS)


def mixture(documents: list[list[int]], n_bytes: int = 0) -> Mixture:
    """Of one source."""
    return Mixture("train", (source(documents, n_bytes=n_bytes),), (1.0,))


def whole_row(rows: Rows, index: int, seq_len: int, apart: bool = False) -> Batch:
    """One row, without the axis of rows."""
    config = DataConfig(seq_len=seq_len, intra_document_mask=apart)
    batch = Table([rows], [rows.n_all], config, n_vocab=1 << 30).read([index])
    return Batch(*(None if array is None else array[0] for array in batch))
