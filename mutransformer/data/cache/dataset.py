"""Tokens that a run trains and is evaluated on: of a source, of a split over several sources, and of all splits."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from jaxtyping import Int64, Integer

from mutransformer.data.cache.shards import Section
from mutransformer.data.cache.store import digest
from mutransformer.data.sources.source import Split
from mutransformer.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenDataset:
    """The tokens of one split of a source: its documents in order, an eos after each. Can be pickled."""

    source: str
    split: Split
    sections: tuple[Section, ...]
    n_bytes: int  # of the text in UTF-8, for a loss in bits per byte
    fingerprint: str  # SHA-256 of the tokens; of the shards' checksums if there are several
    tokenizer_fingerprint: str
    eos_id: int

    @cached_property
    def _tokens_before(self) -> list[int]:
        """Of each section and of the end."""
        return [0, *accumulate(section.n_tokens for section in self.sections)]

    @cached_property
    def _documents_before(self) -> list[int]:
        return [0, *accumulate(section.n_documents for section in self.sections)]

    @property
    def n_tokens(self) -> int:
        return self._tokens_before[-1]

    @property
    def n_documents(self) -> int:
        return self._documents_before[-1]

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """Tokens start ... stop - 1, fewer at the end of the split."""
        stop = min(stop, self.n_tokens)
        k = bisect_right(self._tokens_before, start) - 1
        pieces = []
        while start < stop:
            first, end = self._tokens_before[k : k + 2]
            until = min(stop, end)
            if until > start:
                pieces.append(self.sections[k].tokens(start - first, until - first))
                start = until
            k += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint16), *pieces])

    def ends_within(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Ends of documents, as token positions, after `start` and before `stop`."""
        k = bisect_right(self._tokens_before, start) - 1
        found = []
        while k < len(self.sections) and (first := self._tokens_before[k]) < stop:
            found.append(first + self.sections[k].ends_within(max(0, start - first), stop - first))
            k += 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def document(self, index: int) -> tuple[int, int]:
        """The positions where a document starts and stops, its eos included."""
        k = bisect_right(self._documents_before, index) - 1
        before, within = self._tokens_before[k], index - self._documents_before[k]
        ends = self.sections[k].ends(max(0, within - 1), within + 1).tolist()
        return before + (ends[0] if within else 0), before + ends[-1]

    def place(self, position: int) -> str:
        """The file that holds a token, and its index there, for messages."""
        k = bisect_right(self._tokens_before, position) - 1
        return f"{self.sections[k].reader.path}, {self.split} token {position - self._tokens_before[k]}"


def combine_checksums(checksums: Sequence[str]) -> str:
    """The fingerprint of tokens in shards with these checksums."""
    return checksums[0] if len(checksums) == 1 else hashlib.sha256(" ".join(checksums).encode()).hexdigest()


@dataclass(frozen=True)
class TokenSplit:
    """A split of the data: that of each source, in the order of their names."""

    split: Split
    sources: tuple[TokenDataset, ...]
    weights: tuple[float, ...]  # relative frequency of each source's rows in training

    @property
    def n_tokens(self) -> int:
        return sum(source.n_tokens for source in self.sources)

    @property
    def n_documents(self) -> int:
        return sum(source.n_documents for source in self.sources)

    @property
    def n_bytes(self) -> int:
        return sum(source.n_bytes for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Of the tokens; if there are several sources, also of their names and weights."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        return digest([[s.source, weight, s.fingerprint] for s, weight in zip(self.sources, self.weights, strict=True)])

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.sources[0].tokenizer_fingerprint

    def first(self, n: int) -> Integer[np.ndarray, " m"]:
        """The first n tokens, or fewer if there are fewer, of the sources one after another."""
        found = []
        for source in self.sources:
            found.append(source.read(0, n))
            n -= len(found[-1])
        return np.concatenate(found)


@dataclass(frozen=True)
class Corpus:
    """The tokenizer of a run, and the tokens that it trains and is evaluated on."""

    tokenizer: Tokenizer
    splits: dict[Split, TokenSplit]

    @property
    def fingerprints(self) -> dict[str, str]:
        """By name: processes with equal fingerprints have equal tokens."""
        return {"tokenizer": self.tokenizer.fingerprint} | {split: text.fingerprint for split, text in self.splits.items()}
