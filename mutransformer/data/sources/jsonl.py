"""JSON-lines files, plain or compressed: a document in a field of each line."""

import json
from collections.abc import Iterator
from functools import partial

from mutransformer.config.data import SourceConfig
from mutransformer.data.sources.files import File, find_by_split
from mutransformer.data.sources.source import SHARD_BYTES, UTF8_BOM, Record, SourceShard, Split, text_record
from mutransformer.data.sources.splits import Fractions
from mutransformer.errors import first_line


def jsonl_shards(config: SourceConfig, key: str, fractions: Fractions) -> list[SourceShard]:
    def shard(file: File, split: Split | None, start: int, stop: int | None) -> SourceShard:
        identity = [file.name, file.version, start, stop, config.column, split]
        records = partial(read_lines, file, config.column, split, start, stop)
        return SourceShard(file.path, file.remote, (stop or file.size) - start, identity, records, split)

    shards: list[SourceShard] = []
    for split, file in find_by_split(config, key):
        starts = range(0, 1 if file.compressed else max(1, file.size), SHARD_BYTES)
        shards += [shard(file, split, at, None if file.compressed else min(at + SHARD_BYTES, file.size)) for at in starts]
    return shards


def read_lines(file: File, column: str, split: Split | None, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    """The lines that begin at bytes start ... stop - 1, to the end if stop is None; of a compressed file all lines."""
    lines_before: int | None = None  # counted when a message needs it
    with file.decompressed() as opened:
        at = start
        if at:
            opened.seek(at - 1)
            at += len(opened.readline()) - 1  # the rest of a line that belongs to the shard before
        for number, line in enumerate(opened, start=1):
            if stop is not None and at >= stop:
                return
            record = _parse(line.removeprefix(UTF8_BOM) if at == 0 else line, column)
            if record is not None and record.text is None:
                if lines_before is None:
                    lines_before = count_newlines(file, at) - number + 1 if start else 0
                yield record._replace(place=f"{file.path}:{lines_before + number}")
            elif record is not None:
                yield record._replace(place=file.path, split=split)
            at += len(line)


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
