"""Parts of a source: what one process reads from beginning to end, record by record, and how each kind of file is read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Optional, Protocol, runtime_checkable

from mutransformer.data.cache.store import first_line
from mutransformer.data.sources.files import File
from mutransformer.errors import ConfigError, check

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

PART_BYTES = 64 << 20  # of text in a part, where it can be cut: some ten seconds of one core
_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """A text, or why there is none."""

    place: str  # file, and for a bad record line or row, for messages
    text: Optional[bytes]  # in UTF-8
    split: Optional[Split] = None  # None: by a hash of the text
    reason: str = ""  # where text is None


@runtime_checkable
class Part(Protocol):
    """A share of a source. Can be sent to another process."""

    @property
    def size(self) -> int:
        """About how many bytes; 0 if not known."""
        ...

    @property
    def remote(self) -> bool:
        """Whether reading may fail for a moment, and be tried again."""
        ...

    @property
    def place(self) -> str:
        """The file or shard, for messages."""
        ...

    def identity(self) -> list[Any]:
        """What decides its records, as JSON can hold."""
        ...

    def records(self) -> Iterator[Record]:
        """The records in order.

        Raises:
            ConfigError: the part as a whole cannot be read as what it is said to be.
        """
        ...


@dataclass(frozen=True)
class Document:
    """A file, or consecutive pieces of one file that are in the same split."""

    name: str  # the same wherever the folder lies; "file#k" for text that starts at piece k
    split: Split
    file: File
    start: int  # bytes of the file, a byte-order mark left out
    stop: int

    @property
    def data(self) -> bytes:
        with self.file.open() as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


@dataclass(frozen=True)
class DocumentPart:
    """Whole files, or pieces of them, that were given their splits."""

    documents: tuple[Document, ...]

    @property
    def size(self) -> int:
        return sum(d.stop - d.start for d in self.documents)

    @property
    def remote(self) -> bool:
        return any(d.file.remote for d in self.documents)

    @property
    def place(self) -> str:
        paths = [d.file.path for d in self.documents]
        return paths[0] if len(set(paths)) == 1 else f"{paths[0]} ... {paths[-1]}"

    def identity(self) -> list[Any]:
        return [[d.name, d.split, d.file.version, d.start, d.stop] for d in self.documents]

    def records(self) -> Iterator[Record]:
        for d in self.documents:
            data = d.data
            try:
                data.decode()
                yield Record(d.file.path, data, d.split)
            except UnicodeDecodeError as error:
                line = data.count(b"\n", 0, error.start) + newlines(d.file, d.start) + 1
                place = f"{d.file.path}, line {line}, byte {d.start + error.start}"
                yield Record(place, None, reason=f"not UTF-8 ({error.reason})")


@dataclass(frozen=True)
class LinePart:
    """The lines of a JSON-lines file that begin in start ... stop - 1; of a compressed file all lines."""

    file: File
    start: int
    stop: Optional[int]  # None: to the end
    column: str
    split: Optional[Split]

    @property
    def size(self) -> int:
        return (self.file.size if self.stop is None else self.stop) - self.start

    @property
    def remote(self) -> bool:
        return self.file.remote

    @property
    def place(self) -> str:
        return self.file.path

    def identity(self) -> list[Any]:
        return [self.file.name, self.file.version, self.start, self.stop, self.column, self.split]

    def records(self) -> Iterator[Record]:
        lines_before: Optional[int] = None  # counted when a message needs it
        with self.file.decompressed() as file:
            at = self.start
            if at:
                file.seek(at - 1)
                at += len(file.readline()) - 1  # the rest of a line that the part before has
            for number, line in enumerate(file, start=1):
                if self.stop is not None and at >= self.stop:
                    return
                record = _from_json(line.removeprefix(_BOM) if at == 0 else line, self.column)
                if record is not None and record.text is None:
                    if lines_before is None:
                        lines_before = newlines(self.file, at) - number + 1 if self.start else 0
                    yield Record(f"{self.file.path}:{lines_before + number}", None, reason=record.reason)
                elif record is not None:
                    yield Record(self.file.path, record.text, self.split)
                at += len(line)


def _from_json(line: bytes, column: str) -> Optional[Record]:
    """The record of a line, its place to be filled in; None for a blank line."""
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
    return encoded("", column, fields[column])


def encoded(place: str, column: str, value: Any, split: Optional[Split] = None) -> Record:
    """The record of a value that should be a text."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        return Record(place, None, reason=f"{column!r} is {kind}, not text")
    try:
        return Record(place, value.encode(), split)
    except UnicodeEncodeError as error:
        return Record(place, None, reason=f"not Unicode ({error.reason} at character {error.start})")


@dataclass(frozen=True)
class TablePart:
    """Row groups of a Parquet file, or all of an Arrow file."""

    file: File
    kind: Literal["parquet", "arrow"]
    groups: Optional[tuple[int, ...]]  # None: all
    first_row: int
    bytes_of_text: int
    column: str
    split: Optional[Split]
    key: str  # of the column's setting

    ROWS: ClassVar[int] = 1024  # read at a time

    @property
    def size(self) -> int:
        return self.bytes_of_text

    @property
    def remote(self) -> bool:
        return self.file.remote

    @property
    def place(self) -> str:
        return self.file.path

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
        return encoded(place, self.column, text, self.split)

    def _batches(self, file: Any) -> Iterator[Any]:
        pa = pyarrow(self.file.path)
        with damaged(self.file.path, self.kind):
            if self.kind == "parquet":
                table = pa.parquet.ParquetFile(file)
                self._check(table.schema_arrow)
                yield from table.iter_batches(self.ROWS, row_groups=self.groups, columns=[self.column])
                return
            try:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:  # the streaming form, as data sets are kept in
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


class damaged:
    """Tells what pyarrow finds wrong with a file as a ConfigError."""

    def __init__(self, path: str, kind: str):
        self.path, self.kind = path, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, ValueError) and type(error).__module__.startswith("pyarrow"):
            raise ConfigError(f"{self.path}: not a whole {self.kind.capitalize()} file: {first_line(error)}") from None


def pyarrow(path: str) -> Any:
    """The package, if it is there."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path}: needs pyarrow: pip install 'mutransformer[data]'") from None
    return pyarrow


def newlines(file: File, stop: int) -> int:
    """Line ends in the first bytes of a file."""
    count = 0
    with file.open() as opened:
        while stop > 0 and (block := opened.read(min(stop, 1 << 20))):
            count += block.count(b"\n")
            stop -= len(block)
    return count
