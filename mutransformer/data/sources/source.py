"""A source of text: shards, each read by one process from beginning to end, the records in them, and which are held out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mutransformer.config.data import DataConfig
from mutransformer.errors import ConfigError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SHARD_BYTES = 64 << 20  # of text in a shard, where it can be cut: about ten seconds of one core
UTF8_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """A text, or the reason why there is none."""

    place: str  # file, and for a bad record line or row, for messages
    text: bytes | None  # in UTF-8
    split: Split | None = None  # None: that of its shard, or by a hash of the text
    reason: str = ""  # set where text is None


@dataclass
class RecordCounts:
    """What became of the records of a shard, or of several."""

    read: int = 0  # of them all, whatever became of them
    empty: int = 0  # texts without a character
    skipped: int = 0  # bad records
    first_skipped: str = ""  # place and reason of the first one

    def __add__(self, other: "RecordCounts") -> "RecordCounts":
        read, empty, skipped = self.read + other.read, self.empty + other.empty, self.skipped + other.skipped
        return RecordCounts(read, empty, skipped, self.first_skipped or other.first_skipped)

    def __str__(self) -> str:
        first = f" (the first: {self.first_skipped})" if self.skipped else ""
        return f"{self.read:,} records read, {self.empty:,} empty, {self.skipped:,} skipped{first}"


class BadShard(ConfigError):
    """All n records of a shard are bad for one reason, such as a column that is missing."""

    def __init__(self, message: str, n: int):
        super().__init__(message)
        self.n = n


@dataclass(frozen=True)
class SourceShard:
    """A part of a source. Can be pickled."""

    place: str  # the file or shard, for messages
    remote: bool  # whether reading can fail temporarily, so that it is retried
    size: int  # approximate bytes; 0 if unknown
    identity: list[Any]  # what determines the records, as JSON values
    records: Callable[[], Iterator[Record]]  # reads them in order; raises ConfigError if the file has another format
    split: Split | None = None  # of all records; None: they have their own, or none yet


@dataclass(frozen=True)
class Source:
    """Text that has not been read yet."""

    key: str  # where its settings stand, for messages
    identity: list[Any]  # what determines the records, as JSON values
    shards: Callable[[], list[SourceShard]]  # lists all of them, in order; may query a store or the Hub


def text_record(place: str, column: str, value: Any) -> Record:
    """The record of a value that should be a string."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        return Record(place, None, reason=f"{column!r} is {kind}, not text")
    try:
        return Record(place, value.encode())
    except UnicodeEncodeError as error:
        return Record(place, None, reason=f"not Unicode ({error.reason} at character {error.start})")


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
