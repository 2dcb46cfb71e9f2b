"""Sources: which text there is, in parts that can be read apart, and which documents are held out.

Whole files of text are divided by a hash of their names, and a file that holds much of the text is cut in pieces, so that one
long file can be trained on as well. Records of a file go to a split by a hash of their text, so that a text is never on both
sides. Add a source by a function in SOURCES.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, TypeVar

from mutransformer.config.data import MixedSourceConfig, SourceConfig
from mutransformer.data.sources import hub
from mutransformer.data.sources.files import File, find
from mutransformer.data.sources.readers import (
    PART_BYTES,
    SPLITS,
    Document,
    DocumentPart,
    LinePart,
    Part,
    Record,
    Split,
    TablePart,
    damaged,
    pyarrow,
)
from mutransformer.data.sources.splits import Shares, assign, split_of
from mutransformer.errors import ConfigError, check

T = TypeVar("T")

_SMALLEST_PIECE = 64  # bytes
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Piece(NamedTuple):
    """What the hash sends to a split: a file, or a part of one."""

    name: str
    file: File
    start: int
    stop: int


@dataclass(frozen=True)
class Source:
    """Text that is not read yet.

    Attributes:
        config: its settings.
        key: where they stand, for messages.
        identity: what decides its records, as JSON can hold.
        parts: lists all of it, in order; may ask a store or the Hub.
    """

    config: MixedSourceConfig
    key: str
    identity: list[Any]
    parts: Callable[[], list[Part]]


def open_source(config: MixedSourceConfig, key: str, shares: Shares) -> Source:
    """A source as its settings tell.

    Args:
        config: of the source; a Hub data set's with its revision.
        key: where its settings stand.
        shares: of whole files to hold out; records are divided later, by split_of().

    Raises:
        ConfigError: a file is missing or unreadable, a glob matches nothing, or there is too little text for three splits.
    """
    if config.source == "hub":
        return Source(config, key, hub.identity(config), lambda: hub.parts(config, key))
    found = SOURCES[config.source](config, key, shares)
    return Source(config, key, [part.identity() for part in found], lambda: found)


class Unreadable(Exception):
    """Reading a part failed, be it for a moment."""


class Accepted:
    """The texts of a part in UTF-8, not empty, each with its split. Iterates once.

    Raises:
        ConfigError: from the iteration, a record is bad and is not to be skipped.
        Unreadable: likewise, the part cannot be read further.
    """

    def __init__(self, part: Part, key: str, on_bad_record: Literal["error", "skip"], shares: Shares):
        self._part, self._key, self._skip, self._shares = part, key, on_bad_record == "skip", shares
        self.skipped, self.first_skipped = 0, ""  # how many, and the first one's place and reason

    def __iter__(self) -> Iterator[tuple[bytes, Split]]:
        for record in self._records():
            if record.text is None:
                told = f"{record.place}: {record.reason}"
                check(self._skip, f"{self._key}: {told}; data.on_bad_record=skip would go on without it")
                self.skipped, self.first_skipped = self.skipped + 1, self.first_skipped or told
            elif record.text:
                yield record.text, record.split or split_of(record.text, self._shares)

    def _records(self) -> Iterator[Record]:
        try:
            yield from self._part.records()
        except ConfigError:
            raise
        except Exception as error:  # whatever a file system, a decompressor or the Hub's library raises
            raise Unreadable(f"{self._part.place}: cannot read it: {hub.reason(error)}") from error


def _stdlib(config: SourceConfig, key: str, shares: Shares) -> list[Part]:
    """Python's own library, tests left out: the same for every installation of one Python version. Files stay whole."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces: list[Piece] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _STDLIB_SKIP and not name.startswith("config-")]
        for file in files:
            # The build's own settings, with the paths of the machine that built it.
            if not file.endswith(".py") or file.startswith("_sysconfigdata"):
                continue
            path = Path(folder, file)
            data = path.read_bytes()
            try:
                text = data.decode("utf-8-sig")
            except UnicodeDecodeError:  # fixtures in other encodings are part of the library
                continue
            if text:
                name = path.relative_to(root).as_posix()
                found = File(name, str(path), len(data), hashlib.sha256(data).hexdigest())
                pieces.append(Piece(name, found, len(data) - len(text.encode()), len(data)))
    return _documents(sorted(pieces), key, shares)


def _text(config: SourceConfig, key: str, shares: Shares) -> list[Part]:
    """Files of text. One over about 1/100 of the text is cut in pieces of about 1/400 or more.

    So some hundred files of like size are each held out or trained on as a whole, and one file is divided among the splits. The
    size is a power of two, so that text added later seldom moves the cuts. A document is in memory as a whole: none has more than
    about PART_BYTES, but for a file that is not cut, which may have twice as much.
    """
    if config.validation_files:
        size = PART_BYTES // 4
        given: list[tuple[Split, File]] = [(split, file) for split, files in _own(config, key) for file in files]
        found = _at_once(lambda file: _pieces(file, size), [file for _, file in given])
        return _grouped(_merged((piece, split) for (split, _), pieces in zip(given, found, strict=True) for piece in pieces))
    files = find(config.files, f"{key}.files")[: config.max_parts]
    total = sum(file.size for file in files)
    size = min(max(_SMALLEST_PIECE, 1 << max(0, (total // 256).bit_length() - 1)), PART_BYTES // 2)
    pieces = [piece for pieces in _at_once(lambda file: _pieces(file, size), files) for piece in pieces]
    return _documents(pieces, key, shares, f", {key}.files = {config.files}")


def _at_once(ask: Callable[[File], T], files: list[File]) -> list[T]:
    """What is asked of each file, several at a time: a store takes its while to answer."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, files))


def _pieces(file: File, size: int) -> list[Piece]:
    """A file as a whole, or one of more than 4 * size in pieces of size to 2 * size; none if it is empty."""
    start = _bom(file)
    if file.size - start > 4 * size:
        cuts = [start, *_cuts(file, start, size)]
        return [Piece(f"{file.name}#{k}", file, *span) for k, span in enumerate(pairwise(cuts))]
    return [Piece(file.name, file, start, file.size)] if file.size > start else []


def _cuts(file: File, start: int, size: int) -> Iterator[int]:
    """Where cut() would end its pieces, without reading what lies between."""
    with file.open() as opened:
        while start < file.size:
            at = start + size - 1
            opened.seek(at)
            while at < min(start + 2 * size, file.size):
                block = opened.read(min(1 << 16, start + 2 * size - at))
                if (found := block.find(b"\n")) >= 0:
                    end = at + found + 1
                    break
                at += len(block)
            else:
                end = min(start + 2 * size, file.size)
                opened.seek(end)
                end += next((k for k, byte in enumerate(opened.read(4)) if byte & 0xC0 != 0x80), 0)
            yield end
            start = end


def _documents(pieces: list[Piece], key: str, shares: Shares, files: str = "") -> list[Part]:
    text = sum(piece.stop - piece.start for piece in pieces)
    check(
        len(pieces) >= len(SPLITS),
        f"{key}.source{files}: {text} bytes of text are too few for a train, a validation and a test split",
    )
    splits = assign([piece.name for piece in pieces], *shares)
    return _grouped(_merged(zip(pieces, splits, strict=True)))


def _merged(pieces: Iterable[tuple[Piece, Split]]) -> list[Document]:
    """Consecutive pieces of one file that are in the same split, together."""
    documents: list[Document] = []
    for piece, split in pieces:
        last = documents[-1] if documents else None
        if last and last.file is piece.file and last.split == split and piece.stop - last.start <= PART_BYTES:
            documents[-1] = replace(last, stop=piece.stop)
        else:
            documents.append(Document(piece.name, split, *piece[1:]))
    return documents


def _grouped(documents: list[Document]) -> list[Part]:
    groups: list[list[Document]] = []
    size = PART_BYTES
    for document in documents:
        if size >= PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += document.stop - document.start
    return [DocumentPart(tuple(group)) for group in groups]


def _bom(file: File) -> int:
    with file.open() as opened:
        return 3 if opened.read(3) == b"\xef\xbb\xbf" else 0


def _own(config: SourceConfig, key: str) -> list[tuple[Split, list[File]]]:
    """The files of each split that the settings name.

    Raises:
        ConfigError: a file is named for two splits.
    """
    named: dict[Split, tuple[str, list[str]]] = {
        "train": ("files", config.files),
        "validation": ("validation_files", config.validation_files),
        "test": ("test_files", config.test_files),
    }
    found: dict[Split, list[File]] = {split: find(patterns, f"{key}.{name}") for split, (name, patterns) in named.items()}
    seen: dict[str, str] = {}
    for split, files in found.items():
        for file in files:
            name = named[split][0]
            check(file.path not in seen, f"{key}.{name}: {file.path} is also one of {key}.{seen.get(file.path)}")
            seen[file.path] = name
    return [(split, files[: config.max_parts]) for split, files in found.items()]


def _records(config: SourceConfig, key: str) -> list[tuple[Optional[Split], File]]:
    if config.validation_files:
        return [(split, file) for split, files in _own(config, key) for file in files]
    return [(None, file) for file in find(config.files, f"{key}.files")[: config.max_parts]]


def _jsonl(config: SourceConfig, key: str, shares: Shares) -> list[Part]:
    found: list[Part] = []
    for split, file in _records(config, key):
        if file.compressed:
            found.append(LinePart(file, 0, None, config.column, split))
        else:
            starts = range(0, max(1, file.size), PART_BYTES)
            found += [LinePart(file, at, min(at + PART_BYTES, file.size), config.column, split) for at in starts]
    return found


def _parquet(config: SourceConfig, key: str, shares: Shares) -> list[Part]:
    found: list[Part] = []
    given = _records(config, key)
    for (split, file), groups in zip(given, _at_once(_row_groups, [file for _, file in given]), strict=True):
        first, size, first_row, row = 0, 0, 0, 0
        for i, (n_rows, n_bytes) in enumerate(groups, start=1):
            row += n_rows
            size += n_bytes
            if size >= PART_BYTES or i == len(groups):
                found.append(TablePart(file, "parquet", tuple(range(first, i)), first_row, size, *_column(config, split, key)))
                first, size, first_row = i, 0, row
    return found


def _row_groups(file: File) -> list[tuple[int, int]]:
    """The rows and bytes of each."""
    pa = pyarrow(file.path)
    with file.open() as opened, damaged(file.path, "parquet"):
        metadata = pa.parquet.ParquetFile(opened).metadata
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _arrow(config: SourceConfig, key: str, shares: Shares) -> list[Part]:
    return [TablePart(file, "arrow", None, 0, file.size, *_column(config, split, key)) for split, file in _records(config, key)]


def _column(config: SourceConfig, split: Optional[Split], key: str) -> tuple[str, Optional[Split], str]:
    return config.column, split, f"{key}.column"


SOURCES: dict[str, Callable[[SourceConfig, str, Shares], list[Part]]] = {
    "stdlib": _stdlib,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "arrow": _arrow,
}
