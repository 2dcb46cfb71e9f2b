"""Which documents are held out: a split for each, by a hash of its text or name alone."""

import hashlib
from typing import NamedTuple

from mutransformer.config.data import DataConfig
from mutransformer.data.sources.readers import SPLITS, Split


class Shares(NamedTuple):
    """What a hash sends to validation and to test."""

    validation: float
    test: float


def shares_of(config: DataConfig) -> Shares:
    return Shares(config.validation_fraction, config.test_fraction)


def split_of(text: bytes, shares: Shares) -> Split:
    """The split of a record, by the SHA-256 of its text alone."""
    place = _place(text)
    return "validation" if place < shares.validation else "test" if place < shares.validation + shares.test else "train"


def assign(names: list[str], validation_fraction: float, test_fraction: float) -> list[Split]:
    """The split of each name, by its SHA-256 alone: the same on every machine, and whatever other names there are.

    Only where the hash would leave a split empty, the nearest name by hash goes there. Needs at least three names.
    """
    assert len(names) >= len(SPLITS)
    place = [_place(name.encode(errors="surrogateescape")) for name in names]  # as the file system has it
    held_out = validation_fraction + test_fraction
    n_validation = min(max(1, sum(u < validation_fraction for u in place)), len(names) - 2)
    n_test = min(max(1, sum(validation_fraction <= u < held_out for u in place)), len(names) - 1 - n_validation)
    order = sorted(range(len(names)), key=place.__getitem__)
    splits: list[Split] = ["train"] * len(names)
    for rank, index in enumerate(order[: n_validation + n_test]):
        splits[index] = "validation" if rank < n_validation else "test"
    return splits


def _place(data: bytes) -> float:
    """In [0, 1), by hash."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
