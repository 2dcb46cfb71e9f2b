"""Tokenizes one shard of a source.

A token shard is a file and, written after it, its metadata with the checksum: without metadata it counts as missing.
"""

from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from mutransformer.data.cache.shards import ShardWriter, dtype_for
from mutransformer.data.cache.store import Corrupt, Store, checksum, from_json, to_json
from mutransformer.data.sources.cut import cut
from mutransformer.data.sources.reader import RecordReader, with_retries
from mutransformer.data.sources.source import SourceShard, Split
from mutransformer.data.sources.splits import Fractions
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import check, translate_errors

_SEGMENT = 1 << 20  # bytes of a document tokenized in one piece: SentencePiece takes about fifty times as much memory
_CHUNK = 128 << 10  # bytes of text that a thread tokenizes in one call: more would not fit a processor's cache


@dataclass(frozen=True)
class TokenShards:
    """Where the token shards of a source lie, and how they are made. Can be pickled."""

    store: Store
    folder: str  # in the store
    key: str  # of the source's settings
    n_shards: int
    tokenizer: Tokenizer
    add_bos: bool
    fractions: Fractions
    on_bad_record: Literal["error", "skip"]

    def name(self, index: int) -> str:
        return f"{index:05d}-of-{self.n_shards:05d}"

    def metadata(self, index: int) -> dict[str, Any]:
        """File name, size, checksum and counts of a shard.

        Raises:
            Corrupt: they are missing or differ from what was written.
        """
        name = f"{self.folder}/{self.name(index)}.json"
        return from_json(name, self.store.read(name))

    def present(self) -> set[int]:
        """The shards that exist; their checksums are not verified."""
        names = self.store.names(self.folder)
        return {i for i in range(self.n_shards) if {f"{self.name(i)}.json", f"{self.name(i)}.bin"} <= names}

    def intact(self, index: int) -> bool:
        """Whether a shard exists and has its checksum."""
        try:
            stored = self.metadata(index)
            self.store.fetch(f"{self.folder}/{stored['file']}", stored["bytes"], stored["sha256"])
        except Corrupt:
            return False
        return True


def tokenize_shard(target: TokenShards, shard: SourceShard, index: int, threads: int) -> None:
    """Writes a token shard and then its metadata.

    Raises:
        ConfigError: the shard cannot be read, the tokenizer is broken, or the cache cannot be written.
    """
    name = f"{target.folder}/{target.name(index)}"
    file = target.store.scratch(name)
    try:
        with translate_errors(f"data.cache_dir = {target.store.root}: cannot write there", OSError):
            facts = with_retries(shard, target.key, lambda: _write(target, shard, file, threads))
            facts |= {"file": f"{target.name(index)}.bin"} | checksum(file)
        target.store.put(f"{name}.bin", file)
        target.store.write(f"{name}.json", to_json(facts))
    finally:
        file.unlink(missing_ok=True)


class _Piece(NamedTuple):
    data: bytes
    split: Split
    begins: bool  # a document
    ends: bool


def _write(target: TokenShards, shard: SourceShard, path: Any, threads: int) -> dict[str, Any]:
    """Tokenizes a shard to a file. Returns its counts by split and the bad records."""
    reader = RecordReader(shard, target.key, target.on_bad_record, target.fractions)
    with closing(ShardWriter(path, dtype_for(target.tokenizer.n_vocab))) as writer:
        chunk: list[_Piece] = []
        size = 0
        for data, split in reader:
            start = 0
            for segment in cut(data, _SEGMENT):
                stop = start + len(segment)
                chunk.append(_Piece(segment, split, start == 0, stop == len(data)))
                start = stop
                size += len(segment)
                if size >= _CHUNK * threads:
                    _tokenize(target, chunk, writer, threads)
                    chunk, size = [], 0
        if chunk:
            _tokenize(target, chunk, writer, threads)
        return {"splits": writer.finish(), "skipped": reader.skipped, "first_skipped": reader.first_skipped}


def _tokenize(target: TokenShards, chunk: list[_Piece], writer: ShardWriter, threads: int) -> None:
    tokenizer = target.tokenizer
    bos, eos = (np.array([i], np.int32) for i in (tokenizer.bos_id, tokenizer.eos_id))
    encoded = tokenizer.encode([piece.data.decode() for piece in chunk], threads)
    joined = np.concatenate([eos, *([bos] if target.add_bos else []), *encoded])
    low, high = int(joined.min()), int(joined.max())
    check(
        0 <= low and high < tokenizer.n_vocab,
        f"data.tokenizer: it gave the ids {low} ... {high}, outside its {tokenizer.n_vocab} ids",
    )
    for ids, piece in zip(encoded, chunk, strict=True):
        before = [bos] if target.add_bos and piece.begins else []
        writer.add(piece.split, [*before, ids, eos] if piece.ends else [*before, ids], len(piece.data), piece.ends)
