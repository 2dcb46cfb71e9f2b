"""Reads the texts of a shard: refuses or counts bad records, and retries what fails temporarily."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from mutransformer.data.sources.hub import describe_error
from mutransformer.data.sources.source import SourceShard, Split
from mutransformer.data.sources.splits import Fractions, split_of
from mutransformer.errors import ConfigError, check

ATTEMPTS = 5  # to read a remote shard, with 1, 2, 4, 8 seconds between them

T = TypeVar("T")

_log = logging.getLogger(__name__)


class ReadError(Exception):
    """Reading a shard failed, perhaps temporarily."""


class RecordReader:
    """Iterates once over the texts of a shard that are not empty, in UTF-8, each with its split.

    Raises:
        ConfigError: during the iteration: a record is bad and data.on_bad_record=error.
        ReadError: during the iteration: the shard cannot be read further.
    """

    def __init__(self, shard: SourceShard, key: str, on_bad_record: Literal["error", "skip"], fractions: Fractions):
        self._shard, self._key, self._skip, self._fractions = shard, key, on_bad_record == "skip", fractions
        self.skipped, self.first_skipped = 0, ""  # the number of bad records so far; place and reason of the first one

    def __iter__(self) -> Iterator[tuple[bytes, Split]]:
        try:
            for record in self._shard.records():
                if record.text is None:
                    problem = f"{record.place}: {record.reason}"
                    check(self._skip, f"{self._key}: {problem}; data.on_bad_record=skip skips bad records")
                    self.skipped, self.first_skipped = self.skipped + 1, self.first_skipped or problem
                elif record.text:
                    yield record.text, record.split or split_of(record.text, self._fractions)
        except ConfigError:
            raise
        except Exception as error:  # raised by a file system, a decompressor or the Hub's library
            raise ReadError(f"{self._shard.place}: cannot read it: {describe_error(error)}") from error


def with_retries(shard: SourceShard, key: str, action: Callable[[], T]) -> T:
    """The result of an action that reads a shard; it is repeated after a ReadError if the shard is remote.

    Raises:
        ConfigError: the shard cannot be read.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except ReadError as error:
            if attempt == ATTEMPTS or not shard.remote:
                raise ConfigError(f"{key}: {error}") from error.__cause__
            _log.warning("%s: %s; trying again in %d s", key, error, 2 ** (attempt - 1))
            time.sleep(2 ** (attempt - 1))
    raise AssertionError
