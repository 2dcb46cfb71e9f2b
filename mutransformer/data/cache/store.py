"""Where tokens and tokenizers are kept: a folder, or an object store behind a URL, that any number of processes use at once.

An object appears whole or not at all, and what is written under a name is the same whoever writes it: so nobody needs a lock, and
the slower of two writers does no harm. Whatever is read is checked against a hash first.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from mutransformer.errors import ConfigError, is_url

FORMAT = 2  # of what is written; another number builds everything again
MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


class Damaged(Exception):
    """Something in the cache is missing, or is not as it was written."""


@dataclass(frozen=True)
class Store:
    """Objects by name, e.g. "folder/file", below a local folder or a URL. Can be sent to another process.

    Attributes:
        root: a folder, or a URL of anything that fsspec can write whole objects to; neither rename nor append is needed.
        local_dir: for copies of what lies at a URL, named by their hashes.
        read_only: what is missing is not made.
    """

    root: str
    local_dir: str
    read_only: bool = False

    @property
    def remote(self) -> bool:
        return is_url(self.root) and not self.root.startswith("file://")

    def read(self, name: str) -> bytes | None:
        """The object; None if there is none."""
        with self._told("read"):
            try:
                return self._fs().cat_file(self._url(name)) if self.remote else self._path(name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def names(self, folder: str) -> set[str]:
        """The objects right below a folder; none if it does not exist."""
        with self._told("read"):
            try:
                if self.remote:
                    self._fs().invalidate_cache()
                    return {path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs().ls(self._url(folder), detail=False)}
                return {path.name for path in self._path(folder).iterdir()}
            except (FileNotFoundError, NotADirectoryError):
                return set()

    def scratch(self, name: str) -> Path:
        """A new path for put() to take a file from. What processes that were killed left there is cleared away."""
        with self._told("write"):
            self._scratch.mkdir(parents=True, exist_ok=True)
            self.clear()
            return self._scratch / f".{name.replace('/', '+')}~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex[:8]}"

    def clear(self) -> None:
        """Removes what processes that were killed left of scratch()."""
        for left in self._scratch.glob(f".*~{socket.gethostname()}~*"):
            if not _alive(left.name.split("~")[-2]):
                _remove(left)

    @property
    def _scratch(self) -> Path:
        return Path(self.local_dir).expanduser() if self.remote else self._folder

    @property
    def _folder(self) -> Path:
        return Path(self.root.removeprefix("file://")).expanduser()

    def put(self, name: str, file: Path) -> None:
        """Publishes a file, which is moved away or removed."""
        with self._told("write"):
            try:
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
                if self.remote:
                    self._fs().put_file(str(file), self._url(name))
                else:
                    self._path(name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, self._path(name))
                    _sync(self._path(name).parent)
            finally:
                file.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Publishes a small object."""
        file = self.scratch(name)
        with self._told("write"):
            file.write_bytes(data)
        self.put(name, file)

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """A local file with the object's contents, every byte checked: the object itself, or its copy.

        Raises:
            Damaged: it is missing or differs.
        """
        if not self.remote:
            check_file(self._path(name), size, sha256)
            return self._path(name)
        copy = Path(self.local_dir).expanduser() / sha256[:2] / sha256
        with suppress(Damaged):
            check_file(copy, size, sha256)
            return copy
        file = self.scratch(name)
        try:
            with self._told("read"):
                copy.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._fs().get_file(self._url(name), str(file))
                except FileNotFoundError:
                    raise Damaged(f"{name.rsplit('/', 1)[-1]}: No such file or directory") from None
                check_file(file, size, sha256, name)
                os.replace(file, copy)
        finally:
            file.unlink(missing_ok=True)
        return copy

    def _fs(self) -> Any:
        return fsspec.filesystem(self.root.split("://")[0])

    def _url(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _path(self, name: str) -> Path:
        return self._folder / name

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (ConfigError, Damaged, FileNotFoundError, NotADirectoryError) as error:
            if doing == "write" and isinstance(error, OSError):
                raise ConfigError(f"data.cache_dir = {self.root}: cannot write there: {error.strerror}") from None
            raise
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"data.cache_dir = {self.root}: cannot {doing} there: {first_line(error)}") from None
        except Exception as error:  # each file system of fsspec has its own
            if not self.remote:
                raise
            raise ConfigError(f"data.cache_dir = {self.root}: cannot {doing} there: {first_line(error)}") from error


def check_file(path: Path, size: int, sha256: str, name: str = "") -> None:
    """Raises Damaged unless the file has this size and hash."""
    name = name.rsplit("/", 1)[-1] or path.name
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise Damaged(f"{name}: {found} bytes instead of {size}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise Damaged(f"{name}: not as it was written")
    except OSError as error:
        raise Damaged(f"{name}: {error.strerror}") from None


def seal(facts: dict[str, Any]) -> bytes:
    """JSON with its own hash."""
    return json.dumps({"entry": facts, "sha256": digest(facts)}, indent=1).encode()


def unseal(name: str, data: bytes | None) -> dict[str, Any]:
    """What seal() was given.

    Raises:
        Damaged: data is None, unreadable or changed.
    """
    name = name.rsplit("/", 1)[-1]
    if data is None:
        raise Damaged(f"{name}: No such file or directory")
    try:
        read = json.loads(data)
        facts, told = read["entry"], read["sha256"]
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{name}: unreadable") from None
    if not isinstance(facts, dict) or told != digest(facts):
        raise Damaged(f"{name}: not as it was written")
    return facts


def entry(store: Store, kind: str, settings: list[Any], files: list[str], write: Callable[[Path], dict[str, Any]]) -> list[Path]:
    """Local paths of the files of a small entry, built if it is missing or damaged.

    Args:
        store: where it is kept.
        kind: the first part of the entry's name.
        settings: what decides the contents; they must decide every byte.
        files: the names of the files that make an entry.
        write: writes them to the folder that it is given and returns facts to keep with them, as JSON can hold.

    Raises:
        ConfigError: the store cannot be used.
        Damaged: it is only to be read, and the entry is missing or damaged.
    """
    folder = f"{kind}-{name_of(settings)}"
    try:
        return _files(store, folder, files)
    except Damaged as error:
        if store.read_only:
            raise
        if MANIFEST in store.names(folder):
            _log.warning("the cache %s/%s is damaged and is built again: %s", store.root, folder, error)
    temporary = store.scratch(f"{folder}/new")
    try:
        with store._told("write"):
            temporary.mkdir()
            facts = write(temporary) | {"files": {name: describe(temporary / name) for name in files}}
        for name in files:
            store.put(f"{folder}/{name}", temporary / name)
    finally:
        _remove(temporary)
    store.write(f"{folder}/{MANIFEST}", seal(facts))
    try:
        return _files(store, folder, files)
    except Damaged as error:
        raise ConfigError(f"data.cache_dir = {store.root}: what was just written there is damaged: {error}") from None


def _files(store: Store, folder: str, files: list[str]) -> list[Path]:
    told = unseal(MANIFEST, store.read(f"{folder}/{MANIFEST}"))["files"]
    return [store.fetch(f"{folder}/{name}", told[name]["bytes"], told[name]["sha256"]) for name in files]


def describe(file: Path) -> dict[str, Any]:
    """The size and hash of a file, for a manifest."""
    with open(file, "rb") as handle:
        return {"bytes": os.fstat(handle.fileno()).st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def name_of(settings: list[Any]) -> str:
    """A name for all that is decided by these settings."""
    return hashlib.sha256(json.dumps([FORMAT, *settings]).encode()).hexdigest()[:32]


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
