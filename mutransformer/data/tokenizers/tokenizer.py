"""What a tokenizer is, text to token ids and back; and the one whose tokens are bytes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer


@runtime_checkable
class Tokenizer(Protocol):
    """Ids lie in 0 ... n_vocab - 1; pad_id may equal eos_id. Can be pickled."""

    n_vocab: int
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str  # SHA-256 of everything that determines the ids of a text

    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        """The ids of each text, without bos and eos; a text that spells a special token gets ordinary ids."""
        ...

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        """The text of the ids; special ids give nothing."""
        ...

    def files(self) -> dict[str, Path]:
        """The files that it was read from, by the name under which a run keeps a copy."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids, then bos, eos and pad. Decoding turns bytes that are not UTF-8 into U+FFFD."""

    n_vocab = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258
    fingerprint = hashlib.sha256(b"bytes bos eos pad").hexdigest()

    def encode(self, texts: list[str], threads: int = 1) -> list[Int32[np.ndarray, " _"]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def files(self) -> dict[str, Path]:
        return {}
