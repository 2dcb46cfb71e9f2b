"""Whether a tokenizer gives a text back: many normalize it, or have one token for all that they do not know."""

import os
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int32

from mutransformer.data.tokenizers.tokenizer import Tokenizer

_LONGEST = 1 << 14  # characters compared at a time
_ALL = 1 << 18  # characters from the beginning that are all compared, and of the others one in _EVERY
_EVERY = 64
_SHOWN = 12  # characters of an example before and after the first that differs


class RoundTrip:
    """Compares a sample of the texts that are tokenized with what their tokens decode to."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._seen = self._compared = self._lost = 0  # characters
        self._example: list[str] = []  # of a text, and what it came back as

    def add(self, text: str, ids: Int32[np.ndarray, " _"]) -> None:
        """A text and its tokens. The sample depends on the texts alone."""
        if self._tokenizer.exact:
            return
        for start in range(0, len(text), _LONGEST):
            part = text[start : start + _LONGEST]
            if self._compared < _ALL or self._compared < self._seen // _EVERY:
                self._compare(part, ids if len(part) == len(text) else self._tokenizer.encode([part])[0])
            self._seen += len(part)

    def _compare(self, text: str, ids: Int32[np.ndarray, " _"]) -> None:
        self._compared += len(text)
        back = self._tokenizer.decode(ids)
        # Some add a space in front, or drop one when they decode: no text is lost by it.
        if text.removeprefix(" ") == back.removeprefix(" "):
            return
        self._lost += (Counter(text) - Counter(back)).total()
        if not self._example:
            differ = len(os.path.commonprefix([text, back]))
            self._example = [one[max(0, differ - _SHOWN) : differ + _SHOWN] for one in (text, back)]

    def facts(self) -> dict[str, Any]:
        """As JSON values: the characters compared, and if any text came back otherwise, those lost and an example."""
        found = {"round_trip": {"lost": self._lost, "example": self._example}} if self._example else {}
        return {"compared": self._compared} | found
