"""Token files: the documents of each split, tokenised once and cached as flat arrays."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt

from mutransformer.config import DataConfig, check
from mutransformer.data import cache, sources
from mutransformer.data.sources import SPLITS, Document, Split
from mutransformer.data.tokenize import (
    TRAINING_VERSION,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    train_sentencepiece,
)

_SEGMENT = 1 << 20  # bytes of a document tokenised in one piece: SentencePiece takes some fifty times as much memory
_CHUNK = 8 << 20  # bytes of text tokenised in one call

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """The tokens of a split: its documents in order, an eos after each."""

    split: Split
    path: Path
    tokens: UInt[np.ndarray, " n"]  # mapped from the file
    n_documents: int
    n_bytes: int  # of the text in UTF-8, for a loss in bits per byte
    fingerprint: str  # SHA-256 of the tokens
    tokenizer_fingerprint: str

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Corpus:
    """What a run trains and is evaluated on."""

    tokenizer: Tokenizer
    splits: dict[Split, TokenFile]


def prepare(config: DataConfig) -> Corpus:
    """The tokenizer and the token files for config, from data.cache_dir or built there.

    Any number of processes may call it at once. Reads all of the text each time, to notice a change.

    Raises:
        ConfigError: something is wrong with the files, the tokenizer, its size, or the cache's folder.
    """
    documents = sources.documents(config)
    tokenizer = TOKENIZERS[config.tokenizer](config, documents)
    data = sources.fingerprint(documents)
    entry = cache.entry(
        Path(config.cache_dir).expanduser(),
        "tokens",
        [data, tokenizer.fingerprint],
        [f"{split}.bin" for split in SPLITS],
        lambda at: {"data": data} | _write_tokens(at, documents, tokenizer),
    )
    return Corpus(tokenizer, _open_tokens(entry))


def _sentencepiece(config: DataConfig, documents: list[Document]) -> Tokenizer:
    if config.tokenizer_file is not None:
        return SentencePieceTokenizer(Path(config.tokenizer_file).expanduser())
    train = [document for document in documents if document.split == "train"]

    def write(at: Path) -> dict[str, Any]:
        _log.info("training a SentencePiece tokenizer (%d pieces)", config.vocab_size)
        train_sentencepiece([document.data.decode() for document in train], config.vocab_size, at / "tokenizer.model")
        return {}

    settings = [sources.fingerprint(train), config.vocab_size, TRAINING_VERSION]
    entry = cache.entry(Path(config.cache_dir).expanduser(), "tokenizer", settings, ["tokenizer.model"], write)
    return SentencePieceTokenizer(entry.folder / "tokenizer.model")


def _bytes(config: DataConfig, documents: list[Document]) -> Tokenizer:
    check(config.tokenizer_file is None, "data.tokenizer_file is set: it needs data.tokenizer=sentencepiece")
    return ByteTokenizer()


TOKENIZERS: dict[str, Callable[[DataConfig, list[Document]], Tokenizer]] = {"bytes": _bytes, "sentencepiece": _sentencepiece}


def _open_tokens(entry: cache.Entry) -> dict[Split, TokenFile]:
    files: dict[Split, TokenFile] = {}
    for split in SPLITS:
        path = entry.folder / f"{split}.bin"
        facts = entry.facts["splits"][split]
        files[split] = TokenFile(
            split=split,
            path=path,
            tokens=np.memmap(path, dtype=entry.facts["dtype"], mode="r"),
            n_documents=facts["documents"],
            n_bytes=facts["bytes"],
            fingerprint=entry.sha256[path.name],
            tokenizer_fingerprint=entry.facts["tokenizer"],
        )
    return files


def _write_tokens(folder: Path, documents: list[Document], tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = "<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4"
    splits: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        mine = [document for document in documents if document.split == split]
        with open(folder / f"{split}.bin", "wb") as file:
            n_tokens = sum(_write_chunk(file, chunk, tokenizer, dtype) for chunk in _chunks(mine))
        splits[split] = {"tokens": n_tokens, "documents": len(mine), "bytes": sum(len(document.data) for document in mine)}
    n_tokens = sum(facts["tokens"] for facts in splits.values())
    _log.info("tokenised %d documents, %.1fM tokens", len(documents), n_tokens / 1e6)
    return {"dtype": dtype, "n_vocab": tokenizer.n_vocab, "tokenizer": tokenizer.fingerprint, "splits": splits}


def _chunks(documents: list[Document]) -> Iterator[list[tuple[str, bool]]]:
    """(text, whether its document ends here), in lists of about _CHUNK bytes."""
    chunk: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        segments = list(sources.cut(document.data, _SEGMENT))
        for k, segment in enumerate(segments, start=1):
            chunk.append((segment.decode(), k == len(segments)))
            size += len(segment)
            if size >= _CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _write_chunk(file: BinaryIO, chunk: list[tuple[str, bool]], tokenizer: Tokenizer, dtype: str) -> int:
    """Writes the tokens and returns how many."""
    eos = np.array([tokenizer.eos_id], np.int32)
    parts = []
    for ids, (_, ends) in zip(tokenizer.encode([text for text, _ in chunk]), chunk, strict=True):
        parts += [ids, eos] if ends else [ids]
    tokens = np.concatenate(parts)
    low, high = int(tokens.min()), int(tokens.max())
    check(
        0 <= low and high < tokenizer.n_vocab,
        f"data.tokenizer: it gave the ids {low} ... {high}, outside its {tokenizer.n_vocab} ids",
    )
    file.write(tokens.astype(dtype).tobytes())
    return len(tokens)
