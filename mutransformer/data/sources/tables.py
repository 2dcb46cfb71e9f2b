"""Parquet and Arrow files: a document in a column of each row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mutransformer.config.data import SourceConfig
from mutransformer.data.sources.files import File, FileShard, find_by_split, map_parallel, pyarrow
from mutransformer.data.sources.source import SHARD_BYTES, Record, SourceShard, text_record
from mutransformer.data.sources.splits import Fractions
from mutransformer.errors import check, translate_errors


@dataclass(frozen=True)
class TableShard(FileShard):
    """Row groups of a Parquet file, or all of an Arrow file."""

    kind: Literal["parquet", "arrow"]
    groups: tuple[int, ...] | None  # None: all
    first_row: int
    size: int
    key: str  # of the column's setting

    ROWS: ClassVar[int] = 1024  # read at a time

    def identity(self) -> list[Any]:
        return [self.file.name, self.file.version, self.groups, self.column, self.split]

    def records(self) -> Iterator[Record]:
        row = self.first_row
        with self.file.open() as file:
            for batch in self._batches(file):
                for value in batch.column(0):
                    yield self._record(value, f"{self.file.path}, row {row}")
                    row += 1

    def _record(self, value: Any, place: str) -> Record:
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            return Record(place, None, reason=f"not UTF-8 ({error.reason} at byte {error.start})")
        return text_record(place, self.column, text, self.split)

    def _batches(self, file: Any) -> Iterator[Any]:
        pa = pyarrow(self.file.path)
        with _format_errors(self.file.path, self.kind):
            if self.kind == "parquet":
                table = pa.parquet.ParquetFile(file)
                self._check(table.schema_arrow)
                yield from table.iter_batches(self.ROWS, row_groups=self.groups, columns=[self.column])
                return
            try:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:  # the streaming format, in which the library `datasets` stores its data
                file.seek(0)
                reader = batches = pa.ipc.open_stream(file)
            self._check(reader.schema)
            for batch in batches:
                yield batch.select([self.column])

    def _check(self, schema: Any) -> None:
        found = f"{self.file.path} has {', '.join(map(repr, schema.names))}"
        check(self.column in schema.names, f"{self.key} = {self.column}: no such column; {found}")
        kind, types = schema.field(self.column).type, pyarrow(self.file.path).types
        values = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)
        check(is_text, f"{self.key} = {self.column}: holds {kind}, not text; {found}")


def parquet_shards(config: SourceConfig, key: str, fractions: Fractions) -> list[SourceShard]:
    shards: list[SourceShard] = []
    files = find_by_split(config, key)
    for (split, file), groups in zip(files, map_parallel(_row_groups, [file for _, file in files]), strict=True):
        first, size, first_row, row = 0, 0, 0, 0
        for i, (n_rows, n_bytes) in enumerate(groups, start=1):
            row += n_rows
            size += n_bytes
            if size >= SHARD_BYTES or i == len(groups):
                span = tuple(range(first, i))
                shards.append(TableShard(file, config.column, split, "parquet", span, first_row, size, f"{key}.column"))
                first, size, first_row = i, 0, row
    return shards


def arrow_shards(config: SourceConfig, key: str, fractions: Fractions) -> list[SourceShard]:
    files = find_by_split(config, key)
    return [TableShard(file, config.column, split, "arrow", None, 0, file.size, f"{key}.column") for split, file in files]


def _row_groups(file: File) -> list[tuple[int, int]]:
    """The rows and bytes of each row group."""
    pa = pyarrow(file.path)
    with file.open() as opened, _format_errors(file.path, "parquet"):
        metadata = pa.parquet.ParquetFile(opened).metadata
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _format_errors(path: str, kind: str) -> Any:
    return translate_errors(f"{path}: not a complete {kind.capitalize()} file", pyarrow(path).ArrowInvalid)
