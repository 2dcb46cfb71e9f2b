"""The tokenizer that a config names: given, fetched and kept, or trained here on the train split and kept."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mutransformer.config.data import DataConfig
from mutransformer.data.cache import store as cache
from mutransformer.data.cache.build import Host
from mutransformer.data.cache.store import Store
from mutransformer.data.cache.tokenize_shard import retried
from mutransformer.data.sources.readers import Part
from mutransformer.data.sources.registry import Accepted, Source
from mutransformer.data.sources.splits import shares_of
from mutransformer.data.tokenizers import hf as hf_tokenizer
from mutransformer.data.tokenizers.hf import HFTokenizer
from mutransformer.data.tokenizers.sentencepiece import (
    TRAINING_VERSION,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    train_sentencepiece,
)
from mutransformer.errors import check

_SAMPLE_BYTES = 256 << 20  # of text up to which a tokenizer is trained on all of it
_SAMPLE_PARTS, _SAMPLE_PART = 16, 1 << 20  # beyond: the first so many bytes of so many parts
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx"}

Write = Callable[[Path], dict[str, Any]]

_log = logging.getLogger(__name__)


def open_tokenizer(config: DataConfig, store: Store, host: Host, sources: Sequence[Source]) -> Tokenizer:
    """The tokenizer that config names, kept in store if it is fetched or trained.

    Raises:
        ConfigError: there is none, it is none, or it cannot be trained on the sources.
    """
    return TOKENIZERS[config.tokenizer](config, store, host, sources)


def kept_tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    """The tokenizer of a run, from the copies of its files in the run's folder.

    Raises:
        ConfigError: there is no such folder, or no such copy.
    """
    check(folder.is_dir(), f"{folder}: no run here")
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "sentencepiece":
        return SentencePieceTokenizer(folder / "tokenizer.model")
    missing = [name for name in hf_tokenizer.FILES if not (folder / name).is_file()]
    check(not missing, f"{folder}: lacks the tokenizer's {' and '.join(missing)}, which a run copies to its folder")
    return HFTokenizer(*(folder / name for name in hf_tokenizer.FILES))


def _sentencepiece(config: DataConfig, store: Store, host: Host, sources: Sequence[Source]) -> Tokenizer:
    if config.tokenizer_file is not None:
        return SentencePieceTokenizer(Path(config.tokenizer_file).expanduser())
    check(bool(sources), "data.tokenizer_file is not set: a tokenizer cannot be trained on tokens")

    def write(at: Path) -> dict[str, Any]:
        _log.info("training a SentencePiece tokenizer (%d pieces)", config.vocab_size)
        train_sentencepiece(training_texts(config, sources), config.vocab_size, at / "tokenizer.model")
        return {}

    settings = [[s.identity for s in sources], *shares_of(config), config.on_bad_record, config.vocab_size, TRAINING_VERSION]
    return SentencePieceTokenizer(_entry(store, host, settings, ["tokenizer.model"], write)[0])


def training_texts(config: DataConfig, sources: Sequence[Source]) -> list[str]:
    """Texts of the train splits for a tokenizer to be trained on: all, or of much text a sample, always the same."""
    texts: list[str] = []
    for source in sources:
        parts = source.parts()
        whole = all(part.size for part in parts) and sum(part.size for part in parts) <= _SAMPLE_BYTES
        every = 1 if whole else max(1, len(parts) // _SAMPLE_PARTS)
        most = _SAMPLE_BYTES if whole else _SAMPLE_PART
        for part in parts[::every]:
            texts += retried(part, source.key, partial(_train_texts, part, source.key, config, most))
    return texts


def _train_texts(part: Part, key: str, config: DataConfig, n_bytes: int) -> list[str]:
    texts: list[str] = []
    for data, split in Accepted(part, key, config.on_bad_record, shares_of(config)):
        if split == "train":
            texts.append(data.decode())
            n_bytes -= len(data)
        if n_bytes <= 0:
            break
    return texts


def _bytes(config: DataConfig, store: Store, host: Host, sources: Sequence[Source]) -> Tokenizer:
    return ByteTokenizer()


def _hf(config: DataConfig, store: Store, host: Host, sources: Sequence[Source]) -> Tokenizer:
    """The Hub is asked once, what it gave is kept; a folder is read each time, to notice a change: not the weights in it."""
    name = config.tokenizer_file or ""
    write = partial(hf_tokenizer.convert, name, config.eos_token)
    folder = Path(name).expanduser()
    files = None
    if folder.is_dir():
        read = sorted(path for path in folder.iterdir() if path.suffix not in _WEIGHTS and path.is_file())
        files = [cache.describe(path)["sha256"] for path in read]
    settings = ["hf", name if files is None else files, config.eos_token]
    return HFTokenizer(*_entry(store, host, settings, hf_tokenizer.FILES, write))


def _entry(
    store: Store, host: Host, settings: list[Any], files: list[str], write: Callable[[Path], dict[str, Any]]
) -> list[Path]:
    host.after_first(lambda: store.read(f"tokenizer-{cache.name_of(settings)}/{cache.MANIFEST}") is not None)
    return cache.entry(store, "tokenizer", settings, files, write)


TOKENIZERS: dict[str, Callable[[DataConfig, Store, Host, Sequence[Source]], Tokenizer]] = {
    "bytes": _bytes,
    "sentencepiece": _sentencepiece,
    "hf": _hf,
}
