"""A source of text: shards, each read by one process from beginning to end, and the records in them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mutransformer.config.data import MixedSourceConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SHARD_BYTES = 64 << 20  # of text in a shard, where it can be cut: about ten seconds of one core
UTF8_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """A text, or the reason why there is none."""

    place: str  # file, and for a bad record line or row, for messages
    text: bytes | None  # in UTF-8
    split: Split | None = None  # None: by a hash of the text
    reason: str = ""  # set where text is None


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

    config: MixedSourceConfig
    key: str  # where the settings stand, for messages
    identity: list[Any]  # what determines the records, as JSON values
    shards: Callable[[], list[SourceShard]]  # lists all of them, in order; may query a store or the Hub


def text_record(place: str, column: str, value: Any, split: Split | None = None) -> Record:
    """The record of a value that should be a string."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        return Record(place, None, reason=f"{column!r} is {kind}, not text")
    try:
        return Record(place, value.encode(), split)
    except UnicodeEncodeError as error:
        return Record(place, None, reason=f"not Unicode ({error.reason} at character {error.start})")
