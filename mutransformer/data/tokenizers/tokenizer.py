"""What a tokenizer is: text to token ids and back."""

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
