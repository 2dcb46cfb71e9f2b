"""The tokenizer that a config names: read from a file, fetched from the Hub, or trained on the train split and cached."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mutransformer.config.data import DataConfig
from mutransformer.data.cache.store import Store, cached_files, checksum
from mutransformer.data.sources.registry import RecordReader, with_retries
from mutransformer.data.sources.source import Source, SourceShard, held_out_fractions
from mutransformer.data.tokenizers import hf
from mutransformer.data.tokenizers.sentencepiece import TRAINING_VERSION, SentencePieceTokenizer, train_sentencepiece
from mutransformer.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from mutransformer.errors import check

_SAMPLE_BYTES = 256 << 20  # of text up to which a tokenizer is trained on all of it
_SAMPLE_SHARDS, _SAMPLE_PER_SHARD = 16, 1 << 20  # beyond that: the first bytes of this many shards
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx"}

_log = logging.getLogger(__name__)


def open_tokenizer(config: DataConfig, store: Store, sources: Sequence[Source]) -> Tokenizer:
    """The tokenizer that config names, cached in store if it is fetched or trained.

    Raises:
        ConfigError: it is missing, is not a tokenizer, or cannot be trained on the sources.
        Corrupt: the store is read-only, and the tokenizer is not in it.
    """
    match config.tokenizer:
        case "bytes":
            return ByteTokenizer()
        case "hf":
            return _open_hf(config, store)
        case "sentencepiece":
            return _open_sentencepiece(config, store, sources)


def saved_tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    """The tokenizer of a run, from the copies of its files in the run's folder.

    Raises ConfigError if there is no such folder, or no such copy.
    """
    check(folder.is_dir(), f"{folder}: no run here")
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "sentencepiece":
        return SentencePieceTokenizer(folder / "tokenizer.model")
    missing = [name for name in hf.FILES if not (folder / name).is_file()]
    check(not missing, f"{folder}: lacks the tokenizer's {' and '.join(missing)}, which a run copies to its folder")
    return hf.HFTokenizer(*(folder / name for name in hf.FILES))


def _open_sentencepiece(config: DataConfig, store: Store, sources: Sequence[Source]) -> Tokenizer:
    if config.tokenizer_file is not None:
        return SentencePieceTokenizer(Path(config.tokenizer_file).expanduser())
    check(bool(sources), "data.tokenizer_file is not set: a tokenizer cannot be trained on tokens")

    def write(folder: Path) -> dict[str, Any]:
        _log.info("training a SentencePiece tokenizer (%d pieces)", config.vocab_size)
        train_sentencepiece(training_texts(config, sources), config.vocab_size, folder / "tokenizer.model")
        return {}

    fractions, identities = held_out_fractions(config), [source.identity for source in sources]
    settings = [identities, *fractions, config.on_bad_record, config.vocab_size, TRAINING_VERSION]
    return SentencePieceTokenizer(*cached_files(store, "tokenizer", settings, ["tokenizer.model"], write))


def _open_hf(config: DataConfig, store: Store) -> Tokenizer:
    """The Hub is asked once and its answer cached; a folder is read each time, without weights in it, to notice a change."""
    name = config.tokenizer_file or ""
    folder = Path(name).expanduser()
    version: Any = name
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix not in _WEIGHTS and path.is_file())
        version = [checksum(path)["sha256"] for path in files]
    write = partial(hf.convert, name, config.eos_token)
    return hf.HFTokenizer(*cached_files(store, "tokenizer", ["hf", version, config.eos_token], hf.FILES, write))


def training_texts(config: DataConfig, sources: Sequence[Source]) -> list[str]:
    """Texts of the train splits to train a tokenizer on: all of them, or of much text a sample, always the same."""
    texts: list[str] = []
    for source in sources:
        shards = source.shards()
        use_all = all(shard.size for shard in shards) and sum(shard.size for shard in shards) <= _SAMPLE_BYTES
        every = 1 if use_all else max(1, len(shards) // _SAMPLE_SHARDS)
        n_bytes = _SAMPLE_BYTES if use_all else _SAMPLE_PER_SHARD
        for shard in shards[::every]:
            texts += with_retries(shard, source.key, partial(_train_texts, shard, source.key, config, n_bytes))
    return texts


def _train_texts(shard: SourceShard, key: str, config: DataConfig, n_bytes: int) -> list[str]:
    texts: list[str] = []
    for data, split in RecordReader(shard, key, config):
        if split == "train":
            texts.append(data.decode())
            n_bytes -= len(data)
        if n_bytes <= 0:
            break
    return texts
