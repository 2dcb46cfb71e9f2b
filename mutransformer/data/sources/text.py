"""Documents of plain text: files, cut in pieces where one holds much of the text, and Python's standard library.

Whole files go to a split by a hash of their names. A file that holds much of the text is cut in pieces that are hashed one by
one, so that a single long file can be trained on as well.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

from mutransformer.config.data import FilesConfig
from mutransformer.data.sources.files import File, find_by_split, map_parallel, warn_of_empty
from mutransformer.data.sources.formats import HEAD_BYTES, check_text
from mutransformer.data.sources.source import SHARD_BYTES, SPLITS, UTF8_BOM, Fractions, Record, SourceShard, Split, assign_splits
from mutransformer.errors import check

_BLOCK = 1 << 16  # bytes that are searched for a line end at a time
_SMALLEST_PIECE = 64  # bytes
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def cut(data: bytes, size: int) -> Iterator[bytes]:
    """Text in pieces of size to 2 * size bytes and at most 3 more, each cut when it is asked for."""
    ends = _cut_points(lambda first, last: data[first:last], 0, len(data), size)
    return (data[first:last] for first, last in pairwise(chain([0], ends)))


def _cut_points(read: Callable[[int, int], bytes], start: int, stop: int, size: int) -> Iterator[int]:
    """The end of each piece of the UTF-8 text in bytes start ... stop - 1. read(first, last) is asked for bytes near the ends.

    A piece has size bytes or more, up to the next line end; with none before 2 * size it ends there, between two characters.
    """
    while start < stop:
        at, limit, found = start + size - 1, min(start + 2 * size, stop), -1
        while at < limit and found < 0 and (block := read(at, min(at + _BLOCK, limit))):
            found = block.find(b"\n")
            at += len(block) if found < 0 else found + 1
        if found < 0:
            tail = read(limit, min(limit + 4, stop))
            at_end = 0 if len(tail) == 4 else len(tail)
            at = limit + next((k for k, byte in enumerate(tail) if byte & 0xC0 != 0x80), at_end)
        yield at
        start = at


@dataclass(frozen=True)
class Document:
    """A file, or consecutive pieces of one file that are in the same split."""

    name: str  # independent of where the folder lies; "file#k" for text that starts at piece k
    file: File
    start: int  # bytes of the file, without a byte-order mark
    stop: int
    split: Split | None = None

    @property
    def data(self) -> bytes:
        with self.file.open() as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


def read_documents(documents: list[Document]) -> Iterator[Record]:
    for d in documents:
        data = d.data
        try:
            data.decode()
            yield Record(d.file.path, data, d.split)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + d.file.count_newlines(d.start) + 1
            place = f"{d.file.path}, line {line}, byte {d.start + error.start}"
            yield Record(place, None, reason=f"not UTF-8 ({error.reason})")


def stdlib_shards(config: FilesConfig, key: str, fractions: Fractions) -> Iterator[SourceShard]:
    """Python's standard library without its tests: the same for every installation of one Python version. Files are not cut."""
    root = Path(sysconfig.get_path("stdlib"))
    documents: list[Document] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _STDLIB_SKIP and not name.startswith("config-")]
        for file in files:
            # The settings of the build contain paths of the machine that built it.
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
                documents.append(Document(name, found, len(data) - len(text.encode()), len(data)))
    return _group(_divide(sorted(documents, key=lambda d: d.name), key, fractions))


def text_shards(config: FilesConfig, key: str, fractions: Fractions) -> Iterator[SourceShard]:
    """Files of text. One with more than about 1/100 of the text is cut in pieces of about 1/400 of the text or more.

    So some hundred files of similar size are each in one split, and a single file is divided among the splits. The size is a
    power of two, so that text added later seldom moves the cuts. A document is read into memory: it has at most about
    SHARD_BYTES, or twice as much if it is a file that is not cut.
    """
    files = find_by_split(config, key)
    divided = all(split is None for split, _ in files)
    if not divided:
        size = SHARD_BYTES // 4
    else:
        total = sum(file.size for _, file in files)
        size = min(max(_SMALLEST_PIECE, 1 << max(0, (total // 256).bit_length() - 1)), SHARD_BYTES // 2)
    by_file = map_parallel(lambda found: _pieces(*found, size=size), files)
    warn_of_empty(key, len(files), [file for (_, file), pieces in zip(files, by_file, strict=True) if not pieces])
    pieces = list(chain.from_iterable(by_file))
    return _group(_divide(pieces, key, fractions, f", {key}.files = {config.files}") if divided else pieces)


def _pieces(split: Split | None, file: File, size: int) -> list[Document]:
    """A file as one document, or one of more than 4 * size bytes in pieces of size to 2 * size; none if it is empty."""
    with file.open() as opened:

        def read(first: int, last: int) -> bytes:
            opened.seek(first)
            return opened.read(last - first)

        head = read(0, HEAD_BYTES)
        check_text(head, file.path)
        start = len(UTF8_BOM) if head.startswith(UTF8_BOM) else 0
        if file.size - start <= 4 * size:
            return [Document(file.name, file, start, file.size, split)] if file.size > start else []
        cuts = [start, *_cut_points(read, start, file.size, size)]
        return [Document(f"{file.name}#{k}", file, *span, split) for k, span in enumerate(pairwise(cuts))]


def _divide(pieces: list[Document], key: str, fractions: Fractions, files: str = "") -> list[Document]:
    """Gives each piece its split by a hash of its name."""
    size = sum(piece.stop - piece.start for piece in pieces)
    too_few = f"{size} bytes of text are too few for a train, a validation and a test split"
    check(len(pieces) >= len(SPLITS), f"{key}.source{files}: {too_few}")
    splits = assign_splits([piece.name for piece in pieces], *fractions)
    return [replace(piece, split=split) for piece, split in zip(pieces, splits, strict=True)]


def _group(pieces: Iterable[Document]) -> Iterator[SourceShard]:
    """Joins consecutive pieces of a file that are in the same split, and groups documents to shards of about SHARD_BYTES."""
    documents: list[Document] = []
    for piece in pieces:
        last = documents[-1] if documents else None
        if last and last.file is piece.file and last.split == piece.split and piece.stop - last.start <= SHARD_BYTES:
            documents[-1] = replace(last, stop=piece.stop)
        else:
            documents.append(piece)
    groups: list[list[Document]] = []
    size = SHARD_BYTES
    for document in documents:
        if size >= SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += document.stop - document.start
    for group in groups:
        paths = [d.file.path for d in group]
        yield SourceShard(
            place=paths[0] if len(set(paths)) == 1 else f"{paths[0]} ... {paths[-1]}",
            remote=any(d.file.remote for d in group),
            size=sum(d.stop - d.start for d in group),
            identity=[[d.name, d.split, d.file.version, d.start, d.stop] for d in group],
            records=partial(read_documents, group),
        )
