"""Files with a document in a field of each line or row: JSON lines, plain or compressed, Parquet and Arrow."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from mutransformer.config.data import FilesConfig
from mutransformer.data.sources.files import COMPRESSED, File, find_by_split, map_parallel, pyarrow, warn_of_empty
from mutransformer.data.sources.formats import HEAD_BYTES, check_text
from mutransformer.data.sources.source import (
    SHARD_BYTES,
    UTF8_BOM,
    BadShard,
    Fractions,
    Record,
    SourceShard,
    Split,
    text_record,
)
from mutransformer.errors import first_line, translate_errors

_BATCH_ROWS = 1024  # read at a time
_ARRAY = "JSON array, not JSON lines; write one record a line"


def jsonl_shards(config: FilesConfig, key: str, fractions: Fractions) -> Iterator[SourceShard]:
    for split, file in find_by_split(config, key):
        for start in range(0, 1 if file.compressed else max(1, file.size), SHARD_BYTES):
            stop = None if file.compressed else min(start + SHARD_BYTES, file.size)
            records = partial(read_lines, file, config.column, start, stop)
            yield _shard(config, split, file, (stop or file.size) - start, [start, stop], records)


def parquet_shards(config: FilesConfig, key: str, fractions: Fractions) -> Iterator[SourceShard]:
    files = find_by_split(config, key)
    found = map_parallel(_row_groups, [file for _, file in files])
    warn_of_empty(key, len(files), [file for (_, file), groups in zip(files, found, strict=True) if not groups])
    for (split, file), groups in zip(files, found, strict=True):
        first, size, first_row, row = 0, 0, 0, 0
        for i, (n_rows, n_bytes) in enumerate(groups, start=1):
            row += n_rows
            size += n_bytes
            if size >= SHARD_BYTES or i == len(groups):
                taken = tuple(range(first, i))
                records = partial(read_rows, file, config.column, f"{key}.column", taken, first_row)
                yield _shard(config, split, file, size, [taken], records)
                first, size, first_row = i, 0, row


def arrow_shards(config: FilesConfig, key: str, fractions: Fractions) -> Iterator[SourceShard]:
    for split, file in find_by_split(config, key):
        records = partial(read_rows, file, config.column, f"{key}.column")
        yield _shard(config, split, file, file.size, [None], records)


def _shard(
    config: FilesConfig, split: Split | None, file: File, size: int, part: list[Any], records: Callable[[], Iterator[Record]]
) -> SourceShard:
    identity = [file.name, file.version, *part, config.column, split]
    return SourceShard(file.path, file.remote, size, identity, records, split)


def read_lines(file: File, column: str, start: int = 0, stop: int | None = None) -> Iterator[Record]:
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
            if start == 0 and number == 1:
                check_text(line[:HEAD_BYTES], file.path, () if file.compressed else COMPRESSED)
            record = _parse(file.path, line.removeprefix(UTF8_BOM) if at == 0 else line, column)
            if record is not None and record.text is None:
                if lines_before is None:
                    lines_before = file.count_newlines(at) - number + 1 if start else 0
                record = record._replace(place=f"{file.path}:{lines_before + number}")
            if record is not None:
                yield record
            at += len(line)


def _parse(path: str, line: bytes, column: str) -> Record | None:
    """The record of a line, with only the file as its place; None for a blank line."""
    line = line.strip()
    if not line:
        return None
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start})"
    except RecursionError:
        reason = "not JSON (nested too deep)"
    except json.JSONDecodeError as error:
        reason = f"not JSON ({error.msg} at character {error.pos})"
        if line.startswith(b"[") or line[-2:] == b"},":
            reason = f"a part of a {_ARRAY}"
        elif error.msg == "Extra data":  # also of lines that end in CR alone
            reason = f"more than one JSON value in a line, the second at character {error.pos}; write one record a line"
        elif line == b"{":
            reason = "a JSON object over several lines, not JSON lines; write one record a line"
    except ValueError as error:  # a number of too many digits
        reason = f"not JSON ({first_line(error)})"
    else:
        if isinstance(fields, dict) and column in fields:
            return text_record(path, column, fields[column])
        reason = f"a JSON {type(fields).__name__}, not an object with the field {column!r}"
        if isinstance(fields, list):
            reason = f"a {_ARRAY}"
        elif isinstance(fields, dict):
            reason = f"no field {column!r}; it has {', '.join(map(repr, fields)) or 'none'}"
    return Record(path, None, reason=reason)


def read_rows(file: File, column: str, key: str, groups: tuple[int, ...] | None = None, first_row: int = 0) -> Iterator[Record]:
    """The rows of some groups of a Parquet file, the first of which is row first_row; of all of an Arrow file if groups is None.

    key, the setting that names the column, is for messages.
    """
    row = first_row
    with file.open() as opened:
        for batch in _batches(opened, file.path, column, key, groups):
            for value in batch.column(0):
                place = f"{file.path}, row {row}"
                try:
                    yield text_record(place, column, value.as_py())
                except UnicodeDecodeError as error:
                    yield Record(place, None, reason=f"not UTF-8 ({error.reason} at byte {error.start})")
                row += 1


def _batches(file: Any, path: str, column: str, key: str, groups: tuple[int, ...] | None) -> Iterator[Any]:
    """Batches of the rows, of that column alone."""
    pa = pyarrow(path)
    with _format_errors(path, "Arrow" if groups is None else "Parquet"):
        if groups is not None:
            table = pa.parquet.ParquetFile(file)
            schema = table.schema_arrow
            columns = [column] if column in schema.names else []
            batches = table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns)
        else:
            try:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:  # the streaming format, in which the library `datasets` stores its data
                file.seek(0)
                reader = batches = pa.ipc.open_stream(file)
            schema = reader.schema
        if problem := _why_no_text(schema, column, pa.types):
            n = sum(batch.num_rows for batch in batches)
            raise BadShard(f"{key} = {column}: {problem}; {path} has {', '.join(map(repr, schema.names))}", n)
        for batch in batches:
            yield batch.select([column])


def _why_no_text(schema: Any, column: str, types: Any) -> str | None:
    """Why the rows of a table have no text in a column. One of type null has none either, but is a column of bad records."""
    if column not in schema.names:
        return "no such column"
    kind = schema.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return None if any(test(values) for test in is_text) else f"holds {kind}, not text"


def _row_groups(file: File) -> list[tuple[int, int]]:
    """The rows and bytes of each row group."""
    with file.open() as opened, _format_errors(file.path, "Parquet"):
        metadata = pyarrow(file.path).parquet.ParquetFile(opened).metadata
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _format_errors(path: str, kind: str) -> AbstractContextManager[None]:
    return translate_errors(f"{path}: not a complete {kind} file", pyarrow(path).ArrowInvalid)
