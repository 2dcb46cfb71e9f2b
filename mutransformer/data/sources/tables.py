"""Parquet and Arrow files: a document in a column of each row."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from mutransformer.config.data import SourceConfig
from mutransformer.data.sources.files import File, find_by_split, map_parallel, pyarrow
from mutransformer.data.sources.source import SHARD_BYTES, Record, SourceShard, Split, text_record
from mutransformer.data.sources.splits import Fractions
from mutransformer.errors import check, translate_errors

BATCH_ROWS = 1024  # read at a time


def parquet_shards(config: SourceConfig, key: str, fractions: Fractions) -> list[SourceShard]:
    shards: list[SourceShard] = []
    files = find_by_split(config, key)
    for (split, file), groups in zip(files, map_parallel(_row_groups, [file for _, file in files]), strict=True):
        first, size, first_row, row = 0, 0, 0, 0
        for i, (n_rows, n_bytes) in enumerate(groups, start=1):
            row += n_rows
            size += n_bytes
            if size >= SHARD_BYTES or i == len(groups):
                shards.append(_shard(config, key, file, split, size, tuple(range(first, i)), first_row))
                first, size, first_row = i, 0, row
    return shards


def arrow_shards(config: SourceConfig, key: str, fractions: Fractions) -> list[SourceShard]:
    return [_shard(config, key, file, split, file.size, None, 0) for split, file in find_by_split(config, key)]


def _shard(
    config: SourceConfig, key: str, file: File, split: Split | None, size: int, groups: tuple[int, ...] | None, row: int
) -> SourceShard:
    identity = [file.name, file.version, groups, config.column, split]
    records = partial(read_rows, file, config.column, split, f"{key}.column", groups, row)
    return SourceShard(file.path, file.remote, size, identity, records, split)


def read_rows(
    file: File, column: str, split: Split | None, key: str, groups: tuple[int, ...] | None = None, first_row: int = 0
) -> Iterator[Record]:
    """The rows of some groups of a Parquet file, the first of which is row first_row; of all of an Arrow file if groups is None.

    key, the setting that names the column, is for messages.
    """
    row = first_row
    with file.open() as opened:
        for batch in _batches(opened, file.path, column, key, groups):
            for value in batch.column(0):
                place = f"{file.path}, row {row}"
                try:
                    yield text_record(place, column, value.as_py(), split)
                except UnicodeDecodeError as error:
                    yield Record(place, None, reason=f"not UTF-8 ({error.reason} at byte {error.start})")
                row += 1


def _batches(file: Any, path: str, column: str, key: str, groups: tuple[int, ...] | None) -> Iterator[Any]:
    pa = pyarrow(path)
    with _format_errors(path, "Arrow" if groups is None else "Parquet"):
        if groups is not None:
            table = pa.parquet.ParquetFile(file)
            _check_column(table.schema_arrow, path, column, key)
            yield from table.iter_batches(BATCH_ROWS, row_groups=groups, columns=[column])
            return
        try:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the streaming format, in which the library `datasets` stores its data
            file.seek(0)
            reader = batches = pa.ipc.open_stream(file)
        _check_column(reader.schema, path, column, key)
        for batch in batches:
            yield batch.select([column])


def _check_column(schema: Any, path: str, column: str, key: str) -> None:
    found = f"{path} has {', '.join(map(repr, schema.names))}"
    check(column in schema.names, f"{key} = {column}: no such column; {found}")
    kind, types = schema.field(column).type, pyarrow(path).types
    values = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)
    check(is_text, f"{key} = {column}: holds {kind}, not text; {found}")


def _row_groups(file: File) -> list[tuple[int, int]]:
    """The rows and bytes of each row group."""
    pa = pyarrow(file.path)
    with file.open() as opened, _format_errors(file.path, "Parquet"):
        metadata = pa.parquet.ParquetFile(opened).metadata
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _format_errors(path: str, kind: str) -> AbstractContextManager[None]:
    return translate_errors(f"{path}: not a complete {kind} file", pyarrow(path).ArrowInvalid)
