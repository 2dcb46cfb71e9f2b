"""Files by path, glob or URL: which there are, the version of each, and their bytes."""

import gzip
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from glob import escape, glob
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from mutransformer.config.data import FilesConfig, SourceConfig
from mutransformer.data.cache.store import checksum
from mutransformer.data.sources.formats import HEAD_BYTES, check_compressed, check_table, check_text
from mutransformer.data.sources.source import SPLITS, Split
from mutransformer.errors import ConfigError, check, first_line, is_url, translate_errors

T = TypeVar("T")

_log = logging.getLogger(__name__)

_WILDCARDS = set("*?[")
COMPRESSED = (".gz", ".zst", ".zstd")  # suffixes of JSON lines
_HTTP = ("http://", "https://")  # where ? begins a query
_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class File:
    """A file that exists. Can be pickled."""

    name: str  # path below the fixed part of the pattern that matched it: independent of where the folder lies
    path: str  # local path or URL
    size: int  # bytes
    version: str  # changes with the contents: their SHA-256, or what the store behind the URL reports
    store: tuple[Any, str] | None = None  # None for a local file; the fsspec file system that holds it, and the path there

    @property
    def remote(self) -> bool:
        return self.store is not None

    def open(self) -> Any:
        """A binary file of the stored bytes, for `with`; seekable."""
        return open(self.path, "rb") if self.store is None else self.store[0].open(self.store[1], "rb")

    @contextmanager
    def decompressed(self) -> Iterator[Any]:
        """A binary file of the contents, stored as they are, as .gz or as .zst; compressed ones are read forward only.

        Buffered, since the files of most stores fetch and copy a block or two for each line. A truncated file is an OSError or
        EOFError; several compressed frames, one after another, are read as one. Raises ConfigError if .zst lacks its package, or
        if the file is not compressed as its name says.
        """
        with self.open() as stored:
            if self.compressed:
                check_compressed(stored.read(HEAD_BYTES), self.path, "gzip" if self.gzipped else "Zstandard")
                stored.seek(0)
            if self.gzipped:
                with gzip.GzipFile(fileobj=stored) as file:
                    yield file
            elif self.compressed:
                if not self.size:
                    raise EOFError("empty, not a Zstandard file")
                pa = pyarrow(self.path)
                yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd"), _BLOCK)
            else:
                yield io.BufferedReader(stored, _BLOCK) if self.remote else stored

    @property
    def compressed(self) -> bool:
        return self._has_suffix(*COMPRESSED)

    @property
    def gzipped(self) -> bool:
        return self._has_suffix(".gz")

    def _has_suffix(self, *suffixes: str) -> bool:
        # Of the matched name: a symbolic link may lead to a file that is named by its hash.
        return (self.name.partition("?")[0] if self.path.startswith(_HTTP) else self.name).endswith(suffixes)

    def count_newlines(self, stop: int) -> int:
        """The number of line ends in the first bytes of the file."""
        count = 0
        with self.open() as opened:
            while stop > 0 and (block := opened.read(min(stop, _BLOCK))):
                count += block.count(b"\n")
                stop -= len(block)
        return count


def find(patterns: Iterable[str], key: str) -> list[File]:
    """Every file that a path, glob or URL matches, once, in order of names. Local files are read, to notice a change.

    Raises ConfigError if a pattern matches nothing or names a folder, or a file cannot be read.
    """
    matches: dict[str, tuple[str, Any]] = {}
    for pattern in patterns:
        local = pattern.removeprefix("file://")  # what is left is a URL only if it is chained, file://...::zip://...
        for name, path, store in _match_url(pattern, key) if is_url(local) else _match_local(local, key):
            matches.setdefault(path, (name, store))

    def examine(path: str) -> File:
        name, store = matches[path]
        with translate_errors(f"{key}: cannot read {path}"):
            if store is None:
                facts = checksum(Path(path))
                return File(name, path, facts["bytes"], facts["sha256"])
            fs, path_there = store
            size = fs.info(path_there)["size"]
            check(size is not None, f"{key}: cannot read {path}: the server does not report its size")
            return File(name, path, size, str(fs.ukey(path_there)), store)

    return sorted(map_parallel(examine, matches), key=lambda file: (file.name, file.path))


def find_by_split(config: FilesConfig, key: str) -> list[tuple[Split | None, File]]:
    """The files of a source, at most max_parts of each split; with the split None if documents are divided by a hash.

    What is no SourceConfig has no splits: all files are of one, validation.

    Raises ConfigError as find() does, if a file is named for two splits, or if a local file is not of the source's format.
    """
    if not isinstance(config, SourceConfig) or not config.validation_files:
        together = find(config.files, f"{key}.files")[: config.max_parts]
        map_parallel(partial(_check_format, config.source, f"{key}.files"), together)
        return [(None if isinstance(config, SourceConfig) else "validation", file) for file in together]
    found: list[tuple[Split | None, File]] = []
    named: dict[str, str] = {}  # the setting that names a file, by its path
    for split in SPLITS:
        setting = "files" if split == "train" else f"{split}_files"
        files = find(getattr(config, setting), f"{key}.{setting}")
        for file in files:
            other = named.setdefault(file.path, setting)
            check(other == setting, f"{key}.{setting}: {file.path} is also one of {key}.{other}")
        map_parallel(partial(_check_format, config.source, f"{key}.{setting}"), files[: config.max_parts])
        found.extend((split, file) for file in files[: config.max_parts])
    return found


def _check_format(source: str, key: str, file: File) -> None:
    """Raises ConfigError if a local file is not of the format of its source. A remote one is looked at when it is read."""
    if file.remote:
        return
    with file.open() as opened:
        head = opened.read(HEAD_BYTES)
    where = f"{key}: {file.path}"
    if source in ("parquet", "arrow"):
        check_table(head, where, source.capitalize())
    elif source == "jsonl" and file.compressed:
        check_compressed(head, where, "gzip" if file.gzipped else "Zstandard")
    else:
        check_text(head, where, COMPRESSED if source == "jsonl" else ())


def warn_of_empty(key: str, n: int, empty: Sequence[File]) -> None:
    """Says at each start which of a source's n files give no shard, and so no count of records."""
    if empty:
        _log.warning("%s.files: %d of %d files are empty, the first: %s", key, len(empty), n, empty[0].path)


def map_parallel(action: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """The result of an action for each item, eight at a time: it waits for a disk or a store, or hashes outside of Python."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(action, items))


def pyarrow(path: str) -> Any:
    """The package pyarrow, an extra that the file at path needs."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path}: needs pyarrow: pip install 'mutransformer[data]'") from None
    return pyarrow


def _match_local(pattern: str, key: str) -> list[tuple[str, str, None]]:
    expanded = Path(pattern).expanduser()
    check(not expanded.is_dir(), f"{key}: {pattern} is a folder; name its files, e.g. {expanded.as_posix()}/**/*.txt")
    matches = sorted({path for path in _expand(Path(expanded.anchor), expanded.parts[bool(expanded.anchor) :]) if path.is_file()})
    check(bool(matches), f"{key}: {pattern} matches no file")
    root = expanded.parent
    while _WILDCARDS & set(str(root)) and not root.is_dir():
        root = root.parent
    return [(path.relative_to(root).as_posix(), str(path.resolve()), None) for path in matches]


def _expand(folder: Path, parts: tuple[str, ...], literal: bool = True) -> Iterator[Path]:
    """The paths below a folder that match the parts of a pattern.

    A part is taken literally where a file or folder of exactly that name exists, since a name may contain a bracket. Below a part
    that is a pattern (literal=False) this holds only if the name would not match itself: *.txt stays a pattern there.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if os.path.lexists(folder / part) and (literal or not _WILDCARDS & set(part) or not fnmatchcase(part, part)):
        yield from _expand(folder / part, rest, literal)
    elif part == "**" and rest:
        for below in glob(f"{escape(str(folder))}/**/", recursive=True):
            yield from _expand(Path(below), rest, literal=False)
    elif _WILDCARDS & set(part):
        for match in glob(f"{escape(str(folder))}/{part}", recursive=part == "**"):
            yield from _expand(Path(match), rest, literal=False)


def _match_url(pattern: str, key: str) -> list[tuple[str, str, tuple[Any, str]]]:
    with translate_errors(f"{key}: {pattern}"):  # raised by whatever package the URL needs
        fs, plain = url_to_fs(pattern)
    literal = plain
    wildcards = _WILDCARDS - {"?"} if pattern.startswith(_HTTP) else _WILDCARDS
    try:
        literal = _literal_part(fs, plain, wildcards)
        if literal == plain:
            found = {plain: fs.info(plain)}
        else:
            escaped = re.sub("[*?[]", lambda match: f"[{match[0]}]", literal)
            found = fs.glob(escaped + plain[len(literal) :], maxdepth=None, detail=True)
    except Exception as error:  # each file system of fsspec has its own
        cause = error.__cause__  # fsspec's HTTP turns every failure into FileNotFoundError; the cause has the status
        if not isinstance(error, FileNotFoundError) or (cause is not None and getattr(cause, "status", None) != 404):
            raise ConfigError(f"{key}: cannot list {pattern}: {first_line(cause or error)}") from error
        found = {}
    matches = [path for path, info in found.items() if info["type"] != "directory"]
    check(bool(matches), f"{key}: {pattern} matches no file")
    root = (plain.partition("?")[0] if "?" not in wildcards else plain).rpartition("/")[0]
    root = root[: len(literal)]
    # For messages the path of a match replaces that of the pattern: ftp://HOST/path, zip://path::ARCHIVE.
    head, chained, rest = pattern.partition("::")

    def url(path: str) -> str:
        return (head.removesuffix(plain) + path if head.endswith(plain) else fs.unstrip_protocol(path)) + chained + rest

    return [(path[len(root) :].lstrip("/") if root else path, url(path), (fs, path)) for path in matches]


def _literal_part(fs: Any, path: str, wildcards: set[str]) -> str:
    """The leading folders of a pattern that have no wildcard or exist by exactly that name; the whole pattern if it does."""
    parts = path.split("/")
    for i, part in enumerate(parts):
        if wildcards & set(part) and not fs.exists("/".join(parts[: i + 1])):
            return "/".join(parts[:i])
    return path
