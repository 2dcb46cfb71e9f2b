"""The tokenizer that a config names: read from a file, fetched from the Hub, or trained on the train split and cached."""

import io
import json
import logging
import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece

from mutransformer.config.data import DataConfig
from mutransformer.data.cache.store import Store, cached_files, checksum
from mutransformer.data.sources.hub import describe_error
from mutransformer.data.sources.registry import RecordReader, with_retries
from mutransformer.data.sources.source import RecordCounts, Source, held_out_fractions
from mutransformer.data.sources.text import cut
from mutransformer.data.tokenizers.tokenizer import HF_FILES, ByteTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer
from mutransformer.errors import ConfigError, check, translate_errors

_TRAINING_VERSION = 1  # of train_sentencepiece; another number trains cached tokenizers again
_TRAINING_BYTES = 3_000_000  # more text takes longer and gives the same compression within 0.2 %
_SENTENCE_BYTES = 1024  # a training sentence: complete lines, below SentencePiece's limit of 4192 bytes
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
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "hf":
        return _open_hf(config, store)
    if config.tokenizer_file is not None:
        return SentencePieceTokenizer(Path(config.tokenizer_file).expanduser())
    check(bool(sources), "data.tokenizer_file is not set: a tokenizer cannot be trained on tokens")

    def write(folder: Path) -> dict[str, Any]:
        _log.info("training a SentencePiece tokenizer (%d pieces)", config.vocab_size)
        train_sentencepiece(training_texts(config, sources), config.vocab_size, folder / "tokenizer.model")
        return {}

    fractions, identities = held_out_fractions(config), [source.identity for source in sources]
    settings = [identities, *fractions, config.on_bad_record, config.vocab_size, _TRAINING_VERSION]
    return SentencePieceTokenizer(*cached_files(store, "tokenizer", settings, ["tokenizer.model"], write))


def saved_tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    """The tokenizer of a run, from the copies of its files in the run's folder.

    Raises ConfigError if there is no such folder, or no such copy.
    """
    check(folder.is_dir(), f"{folder}: no run here")
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "sentencepiece":
        return SentencePieceTokenizer(folder / "tokenizer.model")
    missing = [name for name in HF_FILES if not (folder / name).is_file()]
    check(not missing, f"{folder}: lacks the tokenizer's {' and '.join(missing)}, which a run copies to its folder")
    return HFTokenizer(*(folder / name for name in HF_FILES))


def _open_hf(config: DataConfig, store: Store) -> Tokenizer:
    """The Hub is asked once and its answer cached; a folder is read each time, without weights in it, to notice a change."""
    name = config.tokenizer_file or ""
    folder = Path(name).expanduser()
    version: Any = name
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix not in _WEIGHTS and path.is_file())
        version = [checksum(path)["sha256"] for path in files]
    write = partial(convert_hf, name, config.eos_token)
    return HFTokenizer(*cached_files(store, "tokenizer", ["hf", version, config.eos_token], HF_FILES, write))


def convert_hf(name: str, eos_token: str | None, folder: Path) -> dict[str, Any]:
    """Reads a fast tokenizer by Hub id or from a folder, and writes HF_FILES to another folder.

    Raises ConfigError if it is missing, is not a fast tokenizer, needs code of its own, or has no eos.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that PyTorch is missing
    import transformers

    local = Path(name).expanduser()
    where = f"data.tokenizer_file = {name}"
    check(local.is_dir() or not local.exists(), f"{where}: a file; for data.tokenizer=hf name the folder that contains it")
    looks_local = name.startswith(("/", "~", ".")) or name.count("/") > 1
    check(local.is_dir() or not looks_local, f"{where}: no such folder")
    with translate_errors(where, describe=describe_error):
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(str(local) if local.is_dir() else name, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise ConfigError(f"{where}: it comes with code of its own, which is never run") from None
            raise
    backend: Any = getattr(loaded, "backend_tokenizer", None)
    check(backend is not None, f"{where}: not a fast tokenizer (one with a tokenizer.json)")
    eos = loaded.eos_token_id if eos_token is None else backend.token_to_id(eos_token)
    wanted = "its eos token" if eos_token is None else f"data.eos_token = {eos_token}"
    check(eos is not None, f"{where}: {wanted} is missing; name the token that ends each document by data.eos_token")
    n_vocab = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    ids = {"n_vocab": n_vocab, "eos": eos, "bos": loaded.bos_token_id, "pad": loaded.pad_token_id, "unk": loaded.unk_token_id}
    (folder / HF_FILES[0]).write_text(backend.to_str(), encoding="utf-8")
    (folder / HF_FILES[1]).write_text(json.dumps(ids), encoding="utf-8")
    return {"name": name}


def training_texts(config: DataConfig, sources: Sequence[Source]) -> list[str]:
    """Texts of the train splits to train a tokenizer on: all of them, or of much text a sample, always the same.

    Raises ConfigError if a source cannot be read, or if all records of all sources are empty or skipped.
    """
    texts: list[str] = []
    counts = RecordCounts()
    for source in sources:
        shards = source.shards()
        use_all = all(shard.size for shard in shards) and sum(shard.size for shard in shards) <= _SAMPLE_BYTES
        every = 1 if use_all else max(1, len(shards) // _SAMPLE_SHARDS)
        n_bytes = _SAMPLE_BYTES if use_all else _SAMPLE_PER_SHARD
        for shard in shards[::every]:
            found, counted = with_retries(shard, source.key, config, partial(_train_texts, n_bytes))
            texts += found
            counts += counted
    keys = ", ".join(source.key for source in sources)
    check(bool(texts), f"{keys}: no text is left to train a tokenizer on: {counts}")
    return texts


def _train_texts(n_bytes: int, reader: RecordReader) -> tuple[list[str], RecordCounts]:
    texts: list[str] = []
    for data, split in reader:
        if split == "train":
            texts.append(data.decode())
            n_bytes -= len(data)
        if n_bytes <= 0:
            break
    return texts, reader.counts


def train_sentencepiece(texts: list[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-pair SentencePiece model whose decoding is exact, and writes it to path.

    The same texts give the same model. Spaces, tabs and line ends are ordinary text; characters outside the vocabulary are
    spelled in bytes. Text beyond a few megabytes is sampled evenly. vocab_size counts unk, bos, eos, pad (0 to 3) and 256 bytes.

    Raises:
        ConfigError: the texts give fewer pieces, or have more characters, than vocab_size.
        OSError: path cannot be written.
    """
    data = [text.encode() for text in texts]
    every = max(1, sum(map(len, data)) // _TRAINING_BYTES)
    sentences = islice((sentence for d in data for sentence in cut(d, _SENTENCE_BYTES)), 0, None, every)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence.decode() for sentence in sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_digits=True,  # so that every number is spelled the same way
            pad_id=3,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"data.vocab_size = {vocab_size}: {_why_untrained(str(error), sum(map(len, data)))}") from None
    path.write_bytes(model.getvalue())


def _why_untrained(message: str, n_bytes: int) -> str:
    """What SentencePiece's message means for text of so many bytes, and what would be right."""
    text, least = f"{n_bytes:,} bytes of text", DataConfig.__dataclass_fields__["vocab_size"].metadata["bounds"]["min"]
    if most := re.search(r"too high .*<= (\d+)", message):
        enough = int(most[1]) >= least
        advice = "lower it, add text" if enough else f"{least} is the least: the text is too short or too uniform, add some"
        return f"the train split gives at most {most[1]} pieces, of {text}; {advice}, or set data.tokenizer=bytes"
    if needed := re.search(r"required_chars. \d+ vs (\d+)", message):
        return f"the characters of the train split need at least {needed[1]}; raise it"
    if message.startswith("INTERNAL"):  # it leaves out NULs, empty lines and its own symbols, and nothing remained
        unusable = ", which give no pieces at all (only line ends or NULs?)" if n_bytes else ""
        return f"the train split has {text}{unusable}; add text, or set data.tokenizer=bytes"
    return f"SentencePiece cannot be trained on {text}: {' '.join(message.split())}"
