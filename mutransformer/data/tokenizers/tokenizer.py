"""What a tokenizer is, text to token ids and back; and the three kinds: bytes, SentencePiece, Hugging Face's fast tokenizers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int32, Integer

from mutransformer.errors import ConfigError, check, translate_errors

HF_FILES = ["tokenizer.json", "special_ids.json"]  # that convert_hf() writes

_SPACE = "\u2581"  # SentencePiece's own symbol for a space
_CACHED_WORDS = 1 << 16  # words whose ids Hugging Face's library caches: 5 % faster than its default of 10,000, about 20 MB


class Tokenizer(ABC):
    """Ids lie in 0 ... n_vocab - 1; pad_id may equal eos_id. Can be pickled: its files must be the arguments of its class."""

    n_vocab: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int | None = None  # stands for what it does not know
    exact: bool = False  # whether every text comes back, whatever it is
    fingerprint: str  # SHA-256 of everything that determines the ids of a text
    _files: dict[str, Path] = {}

    @abstractmethod
    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        """The ids of each text, without bos and eos; a text that spells a special token gets ordinary ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        """The text of the ids; special ids give nothing."""

    def piece(self, token: int) -> str:
        """The name of an id in the vocabulary, to be looked at: not every piece is text of its own."""
        return self.decode([token])

    def files(self) -> dict[str, Path]:
        """The files that it was read from, by the name under which a run keeps a copy."""
        return self._files

    def __reduce__(self) -> Any:  # the file names only: workers are started one after another, each waits for its data
        return type(self), tuple(self._files.values())


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids, then bos, eos and pad. Decoding turns bytes that are not UTF-8 into U+FFFD."""

    n_vocab = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258
    exact = True
    fingerprint = hashlib.sha256(b"bytes bos eos pad").hexdigest()

    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def piece(self, token: int) -> str:
        return ascii(chr(token))[1:-1] if token < 256 else ("<bos>", "<eos>", "<pad>")[token - 256]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. If it has no bos or pad, eos takes their place.

    Raises ConfigError if the file cannot be read, is not a SentencePiece model, or has no eos.
    """

    def __init__(self, model_file: Path):
        where = f"data.tokenizer_file = {model_file}"
        with translate_errors(f"{where}: cannot read it", OSError):
            proto = model_file.read_bytes()
        check(bool(proto), f"{where}: an empty file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError:
            raise ConfigError(f"{where}: not a SentencePiece model") from None
        check(self._model.eos_id() >= 0, f"{where}: it has no end-of-sentence piece, which separates documents")
        self._files = {"tokenizer.model": model_file}
        self.n_vocab = self._model.get_piece_size()
        self.eos_id = self._model.eos_id()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos_id
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        self.unk_id = self._model.unk_id()
        self.fingerprint = hashlib.sha256(proto).hexdigest()
        bytes_of_space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        has_bytes = all(map(self._model.is_byte, bytes_of_space))
        self._space_ids = np.array(bytes_of_space, np.int32) if has_bytes else None

    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        # SentencePiece would decode its symbol for a space as a space; spelled in bytes the symbol survives.
        split = [[text] if self._space_ids is None else text.split(_SPACE) for text in texts]
        flat = [part for parts in split for part in parts]
        encoded = iter(self._model.encode(flat, num_threads=threads, return_type="numpy"))
        ids: list[Int32[np.ndarray, " _"]] = []
        for parts in split:
            joined = [next(encoded)]
            for part in islice(encoded, len(parts) - 1):
                joined += [self._space_ids, part]
            ids.append(joined[0] if len(joined) == 1 else np.concatenate(joined))
        return ids

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        return self._model.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        return self._model.id_to_piece(int(token))


class HFTokenizer(Tokenizer):
    """A tokenizer in the two HF_FILES that convert_hf() writes. If it names no bos or pad, as most do, eos takes their place.

    Its template of special tokens (T5 ends with an eos, Llama begins with a bos) is not used: with data.add_bos documents begin
    with a bos, and each ends with one eos.
    """

    def __init__(self, tokenizer: Path, special_ids: Path):
        text = tokenizer.read_text(encoding="utf-8")
        ids = json.loads(special_ids.read_text(encoding="utf-8"))
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if resize := getattr(self._tokenizer.model, "_resize_cache", None):
            resize(_CACHED_WORDS)
        self._tokenizer.encode_special_tokens = True  # a text that spells one gets ordinary ids
        self.n_vocab, self.eos_id = ids["n_vocab"], ids["eos"]
        self.bos_id = ids["eos"] if ids["bos"] is None else ids["bos"]
        self.pad_id = ids["eos"] if ids["pad"] is None else ids["pad"]
        self.unk_id = ids["unk"]
        self._special = {self.eos_id, self.bos_id, self.pad_id} - {self.unk_id}
        self.fingerprint = hashlib.sha256(json.dumps([text, ids], sort_keys=True).encode()).hexdigest()
        self._files = dict(zip(HF_FILES, (tokenizer, special_ids), strict=True))

    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        """As Tokenizer.encode. The library takes its number of threads from RAYON_NUM_THREADS when it first starts them."""
        encoded = [np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        joined = np.concatenate(encoded) if encoded else np.empty(0, np.int32)
        if any((joined == special).any() for special in self._special):
            return [self._ordinary(ids) for ids in encoded]
        return encoded

    def _ordinary(self, ids: Int32[np.ndarray, " _"]) -> Int32[np.ndarray, " _"]:
        """Replaces special tokens by unk: a unigram model (T5) has them as pieces and finds them where they are spelled."""
        for special in self._special:
            if (spelled := ids == special).any():
                ids = ids[~spelled] if self.unk_id is None else np.where(spelled, np.int32(self.unk_id), ids)
        return ids

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(int(token)) or ""
