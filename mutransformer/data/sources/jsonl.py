"""JSON-lines files, plain or compressed: a document in a field of each line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mutransformer.config.data import SourceConfig
from mutransformer.data.sources.files import File, FileShard, find_by_split
from mutransformer.data.sources.source import SHARD_BYTES, UTF8_BOM, Record, SourceShard, text_record
from mutransformer.data.sources.splits import Fractions
from mutransformer.errors import first_line


@dataclass(frozen=True)
class LineShard(FileShard):
    """The lines of a JSON-lines file that begin at bytes start ... stop - 1; of a compressed file all lines."""

    start: int = 0
    stop: int | None = None  # None: to the end

    @property
    def size(self) -> int:
        return (self.file.size if self.stop is None else self.stop) - self.start

    def identity(self) -> list[Any]:
        return [self.file.name, self.file.version, self.start, self.stop, self.column, self.split]

    def records(self) -> Iterator[Record]:
        lines_before: int | None = None  # counted when a message needs it
        with self.file.decompressed() as file:
            at = self.start
            if at:
                file.seek(at - 1)
                at += len(file.readline()) - 1  # the rest of a line that belongs to the shard before
            for number, line in enumerate(file, start=1):
                if self.stop is not None and at >= self.stop:
                    return
                record = _parse(line.removeprefix(UTF8_BOM) if at == 0 else line, self.column)
                if record is not None and record.text is None:
                    if lines_before is None:
                        lines_before = count_newlines(self.file, at) - number + 1 if self.start else 0
                    yield record._replace(place=f"{self.file.path}:{lines_before + number}")
                elif record is not None:
                    yield record._replace(place=self.file.path, split=self.split)
                at += len(line)


def jsonl_shards(config: SourceConfig, key: str, fractions: Fractions) -> list[SourceShard]:
    shards: list[SourceShard] = []
    for split, file in find_by_split(config, key):
        if file.compressed:
            shards.append(LineShard(file, config.column, split))
        else:
            starts = range(0, max(1, file.size), SHARD_BYTES)
            shards += [LineShard(file, config.column, split, at, min(at + SHARD_BYTES, file.size)) for at in starts]
    return shards


def _parse(line: bytes, column: str) -> Record | None:
    """The record of a line, without its place; None for a blank line."""
    line = line.strip()
    if not line:
        return None
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Record("", None, reason=f"not UTF-8 ({error.reason} at byte {error.start})")
    except RecursionError:
        return Record("", None, reason="not JSON (nested too deep)")
    except json.JSONDecodeError as error:
        return Record("", None, reason=f"not JSON ({error.msg} at character {error.pos})")
    except ValueError as error:  # a number of too many digits
        return Record("", None, reason=f"not JSON ({first_line(error)})")
    if not isinstance(fields, dict):
        return Record("", None, reason=f"a JSON {type(fields).__name__}, not an object with the field {column!r}")
    if column not in fields:
        return Record("", None, reason=f"no field {column!r}; it has {', '.join(map(repr, fields)) or 'none'}")
    return text_record("", column, fields[column])


def count_newlines(file: File, stop: int) -> int:
    """The number of line ends in the first bytes of a file."""
    count = 0
    with file.open() as opened:
        while stop > 0 and (block := opened.read(min(stop, 1 << 20))):
            count += block.count(b"\n")
            stop -= len(block)
    return count
