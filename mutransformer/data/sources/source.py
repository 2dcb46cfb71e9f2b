"""A source of text: shards, each read by one process from beginning to end, and the records in them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class SourceShard(Protocol):
    """A part of a source. Can be pickled."""

    @property
    def size(self) -> int:
        """Approximate bytes; 0 if unknown."""
        ...

    @property
    def remote(self) -> bool:
        """Whether reading can fail temporarily, so that it is retried."""
        ...

    @property
    def place(self) -> str:
        """The file or shard, for messages."""
        ...

    def identity(self) -> list[Any]:
        """What determines the records, as JSON values."""
        ...

    def records(self) -> Iterator[Record]:
        """The records in order.

        Raises:
            ConfigError: the shard is not of the format that the settings name.
        """
        ...


@dataclass(frozen=True)
class Source:
    """Text that has not been read yet.

    Attributes:
        config: settings of the source.
        key: where they stand, for messages.
        identity: what determines the records, as JSON values.
        shards: lists all shards, in order; may query a store or the Hub.
    """

    config: MixedSourceConfig
    key: str
    identity: list[Any]
    shards: Callable[[], list[SourceShard]]


def text_record(place: str, column: str, value: Any, split: Split | None = None) -> Record:
    """The record of a value that should be a string."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        return Record(place, None, reason=f"{column!r} is {kind}, not text")
    try:
        return Record(place, value.encode(), split)
    except UnicodeEncodeError as error:
        return Record(place, None, reason=f"not Unicode ({error.reason} at character {error.start})")
