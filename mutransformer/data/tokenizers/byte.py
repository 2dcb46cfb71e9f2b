"""Bytes as tokens."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer


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
