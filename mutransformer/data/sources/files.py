"""Files by path, glob or URL: what there is, what version of it, and its bytes."""

import gzip
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from mutransformer.data.cache.store import first_line
from mutransformer.errors import ConfigError, check, is_url

_ANY = set("*?[")
_HTTP = ("http://", "https://")  # where ? begins a query
_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class File:
    """A file that was found.

    Attributes:
        name: its path below the fixed part of the pattern that found it: the same wherever the folder lies.
        path: where it is: a local path or a URL.
        size: bytes.
        version: another one if the contents change: their SHA-256, or what the store behind the URL tells.
    """

    name: str
    path: str
    size: int
    version: str

    @property
    def remote(self) -> bool:
        return is_url(self.path)

    def open(self) -> Any:
        """A binary file of the bytes as they are stored, for `with`; seekable."""
        return fsspec.open(self.path, "rb") if self.remote else open(self.path, "rb")

    @contextmanager
    def decompressed(self) -> Iterator[Any]:
        """A binary file of the contents, whether they are stored plain, as .gz or as .zst; those forward only.

        Buffered, since the files of most stores fetch and copy a block or two for each line.

        Raises:
            ConfigError: .zst needs a package that is missing.
        """
        with self.open() as stored:
            if self._ends(".gz"):
                with gzip.GzipFile(fileobj=stored) as file:
                    yield file
            elif self.compressed:
                try:
                    import zstandard
                except ImportError:
                    raise ConfigError(f"{self.path}: needs zstandard: pip install 'mutransformer[data]'") from None
                yield io.BufferedReader(_Frames(stored, zstandard.ZstdDecompressor().decompressobj), _BLOCK)
            else:
                yield io.BufferedReader(stored, _BLOCK) if self.remote else stored

    @property
    def compressed(self) -> bool:
        return self._ends(".gz", ".zst", ".zstd")

    def _ends(self, *suffixes: str) -> bool:
        # The name that was given: a link may lead to a file that is named by its hash.
        return (self.name.partition("?")[0] if self.path.startswith(_HTTP) else self.name).endswith(suffixes)


class _Frames(io.RawIOBase):
    """The contents of Zstandard's frames, one after another. The package's own reader takes a file that is cut off for whole."""

    def __init__(self, stored: Any, new: Callable[[], Any]):
        self._stored, self._new = stored, new
        self._frame = new()
        self._read, self._left = b"", memoryview(b"")  # what is not yet decompressed, and what is

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            # No more at once, since little may stand for much.
            self._read = self._read or self._stored.read(_BLOCK // 16)
            if not self._read:
                if not self._frame.eof:
                    raise EOFError("it ends within a Zstandard frame")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._left = memoryview(self._frame.decompress(self._read))
            self._read = self._frame.unused_data
        n = min(len(buffer), len(self._left))
        buffer[:n], self._left = self._left[:n], self._left[n:]
        return n


def find(patterns: Iterable[str], key: str) -> list[File]:
    """Every file that a pattern matches, once, in order of names. Local ones are read, to notice a change.

    Args:
        patterns: local paths, globs or URLs.
        key: the setting that they are from.

    Raises:
        ConfigError: a pattern matches nothing, names a folder, or a file cannot be read.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for name, path in _remote(pattern, key) if is_url(pattern) else _local(pattern, key):
            found.setdefault(path, name)

    def file(path: str, name: str) -> File:
        try:
            if is_url(path):
                fs, plain = url_to_fs(path)
                size = fs.info(plain)["size"]
                if size is None:
                    raise ValueError("its size is not told")
                return File(name, path, size, str(fs.ukey(plain)))
            with open(path, "rb") as handle:
                version = hashlib.file_digest(handle, "sha256").hexdigest()
                return File(name, path, handle.tell(), version)
        except Exception as error:  # each file system of fsspec has its own
            raise ConfigError(f"{key}: cannot read {path}: {first_line(error)}") from error

    with ThreadPoolExecutor(8) as pool:  # hashing and asking a store both leave Python
        return sorted(pool.map(file, found.keys(), found.values()), key=lambda f: (f.name, f.path))


def cut(data: bytes, size: int) -> Iterator[bytes]:
    """UTF-8 text in pieces of size bytes or somewhat more, each to the next line end; a line of 2 * size is cut in itself."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + size - 1, start + 2 * size) + 1
        if end == 0:
            end = min(start + 2 * size, len(data))
            while end < len(data) and data[end] & 0xC0 == 0x80:  # within a character
                end += 1
        yield data[start:end]
        start = end


def _local(pattern: str, key: str) -> list[tuple[str, str]]:
    expanded = Path(pattern).expanduser()
    check(not expanded.is_dir(), f"{key}: {pattern} is a folder; name its files, e.g. {expanded.as_posix()}/**/*.txt")
    # A file of that very name comes first, since a name may hold a bracket.
    matches = [expanded] if expanded.is_file() else [Path(p) for p in glob(str(expanded), recursive=True)]
    matches = [path for path in matches if path.is_file()]
    check(bool(matches), f"{key}: {pattern} matches no file")
    root = expanded.parent
    while _ANY & set(str(root)) and not root.is_dir():
        root = root.parent
    return [(path.relative_to(root).as_posix(), str(path.resolve())) for path in matches]


def _remote(pattern: str, key: str) -> list[tuple[str, str]]:
    try:
        fs, plain = url_to_fs(pattern)
    except Exception as error:  # of whatever package it needs
        raise ConfigError(f"{key}: {pattern}: {first_line(error)}") from error
    magic = _ANY - {"?"} if pattern.startswith(_HTTP) else _ANY
    named = bool(magic & set(plain))
    try:
        found = fs.glob(plain, maxdepth=None, detail=True) if named else {plain: fs.info(plain)}
    except Exception as error:  # each file system of fsspec has its own
        cause = error.__cause__  # of HTTP's error for all that fails, the status
        if not isinstance(error, FileNotFoundError) or (cause is not None and getattr(cause, "status", None) != 404):
            raise ConfigError(f"{key}: cannot list {pattern}: {first_line(cause or error)}") from error
        found = {}
    matches = [path for path, info in found.items() if info["type"] != "directory"]
    check(bool(matches), f"{key}: {pattern} matches no file")
    root = (plain.partition("?")[0] if "?" not in magic else plain).rpartition("/")[0]
    while magic & set(root):
        root = root.rpartition("/")[0]
    # What else than a path tells the place, as the host of ftp://host/path or the archive of zip://path::archive, is kept.
    head, chained, rest = pattern.partition("::")
    kept = head.removesuffix(plain) if chained or fs._get_kwargs_from_urls(pattern) else None

    def url(path: str) -> str:
        return fs.unstrip_protocol(path) if kept is None else f"{kept}{path}{chained}{rest}"

    return [(path[len(root) :].lstrip("/") if root else path, url(path)) for path in matches]
