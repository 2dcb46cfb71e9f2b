"""Which documents are held out: the split of each, by a hash of its text or name alone."""

import hashlib
from typing import NamedTuple

from mutransformer.config.data import DataConfig
from mutransformer.data.sources.source import SPLITS, Split


class Fractions(NamedTuple):
    """The fractions of documents that are held out."""

    validation: float
    test: float


def held_out_fractions(config: DataConfig) -> Fractions:
    return Fractions(config.validation_fraction, config.test_fraction)


def split_of(text: bytes, fractions: Fractions) -> Split:
    """The split of a record, by the SHA-256 of its text alone."""
    u = _uniform(text)
    return "validation" if u < fractions.validation else "test" if u < fractions.validation + fractions.test else "train"


def assign_splits(names: list[str], validation_fraction: float, test_fraction: float) -> list[Split]:
    """The split of each name, by its SHA-256 alone: the same on every machine and whatever the other names are.

    Exception: if the hash leaves a split empty, the name with the nearest hash goes there. Needs at least three names.
    """
    assert len(names) >= len(SPLITS)
    u = [_uniform(name.encode(errors="surrogateescape")) for name in names]  # the bytes that the file system stores
    held_out = validation_fraction + test_fraction
    n_validation = min(max(1, sum(x < validation_fraction for x in u)), len(names) - 2)
    n_test = min(max(1, sum(validation_fraction <= x < held_out for x in u)), len(names) - 1 - n_validation)
    splits: list[Split] = ["train"] * len(names)
    for rank, index in enumerate(sorted(range(len(names)), key=u.__getitem__)[: n_validation + n_test]):
        splits[index] = "validation" if rank < n_validation else "test"
    return splits


def _uniform(data: bytes) -> float:
    """A number in [0, 1), by hash."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
