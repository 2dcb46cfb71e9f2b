"""The sources by the value of `source`, and how the texts of a shard are read, whichever source it is of.

A new source is a function that lists its shards, its line in SOURCES, and its name in SourceConfig.source.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from mutransformer.config.data import DataConfig, FilesConfig, SourceConfig
from mutransformer.data.sources import hub
from mutransformer.data.sources.records import arrow_shards, jsonl_shards, parquet_shards
from mutransformer.data.sources.source import (
    BadShard,
    Fractions,
    RecordCounts,
    Source,
    SourceShard,
    Split,
    held_out_fractions,
    split_of,
)
from mutransformer.data.sources.text import stdlib_shards, text_shards
from mutransformer.errors import ConfigError, check

ATTEMPTS = 5  # to read a remote shard, with 1, 2, 4, 8 seconds between them

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Each lists its shards from the settings, the key below which they stand, and the fractions of whole files to hold out.
SOURCES: dict[str, Callable[[Any, str, Fractions], Iterable[SourceShard]]] = {
    "stdlib": stdlib_shards,
    "text": text_shards,
    "jsonl": jsonl_shards,
    "parquet": parquet_shards,
    "arrow": arrow_shards,
}


def open_source(config: FilesConfig, key: str, fractions: Fractions) -> Source:
    """A source with the identity of its text; a Hub data set, whose revision must be a commit, is not listed yet.

    Only whole files are held out by their fractions here; records are divided later, by split_of(). Raises ConfigError if a file
    is missing or unreadable, a glob matches nothing, or there is too little text for three splits.
    """
    if isinstance(config, SourceConfig) and config.source == "hub":
        return Source(key, hub.identity(config), lambda: list(hub.hub_shards(config, key)))
    shards = list(SOURCES[config.source](config, key, fractions))
    return Source(key, [shard.identity for shard in shards], lambda: shards)


class ReadError(Exception):
    """Reading a shard failed, perhaps temporarily."""


class RecordReader:
    """Iterates once over the texts of a shard that are not empty, in UTF-8, each with its split.

    Raises:
        ConfigError: during the iteration: a record is bad and data.on_bad_record=error.
        ReadError: during the iteration: the shard cannot be read further.
    """

    def __init__(self, shard: SourceShard, key: str, config: DataConfig):
        self._shard, self._key, self._skip = shard, key, config.on_bad_record == "skip"
        self._fractions = held_out_fractions(config)
        self.counts = RecordCounts()  # of the records so far

    def __iter__(self) -> Iterator[tuple[bytes, Split]]:
        counts = self.counts
        try:
            for record in self._shard.records():
                counts.read += 1
                if record.text is None:
                    problem = f"{record.place}: {record.reason}"
                    check(self._skip, f"{self._key}: {problem}; data.on_bad_record=skip skips bad records")
                    counts.skipped, counts.first_skipped = counts.skipped + 1, counts.first_skipped or problem
                elif record.text:
                    yield record.text, self._shard.split or record.split or split_of(record.text, self._fractions)
                else:
                    counts.empty += 1
        except BadShard as error:
            if not self._skip:
                raise ConfigError(str(error)) from None
            counts.read, counts.skipped = counts.read + error.n, counts.skipped + error.n
            counts.first_skipped = counts.first_skipped or str(error)
        except ConfigError:
            raise
        except Exception as error:  # raised by a file system, a decompressor or the Hub's library
            raise ReadError(f"{self._shard.place}: cannot read it: {hub.describe_error(error)}") from error


def with_retries(shard: SourceShard, key: str, config: DataConfig, action: Callable[[RecordReader], T]) -> T:
    """The result of an action that reads a shard; it is repeated after a ReadError if the shard is remote.

    Raises ConfigError if the shard cannot be read.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action(RecordReader(shard, key, config))
        except ReadError as error:
            if attempt == ATTEMPTS or not shard.remote:
                raise ConfigError(f"{key}: {error}") from error.__cause__
            _log.warning("%s: %s; trying again in %d s", key, error, 2 ** (attempt - 1))
            time.sleep(2 ** (attempt - 1))
    raise AssertionError
