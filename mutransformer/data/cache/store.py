"""A store of objects: a folder, or an object store behind a URL. It holds the cache of tokens and tokenizers, and runs at a URL.

An object appears complete or not at all. Of the cache, whoever writes a name writes the same bytes: so no lock is needed, and the
slower of two writers does no harm. What is read of it is checked against a checksum first.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from mutransformer.errors import is_url, redact, translate_errors

FORMAT = 2  # of what is written; another number builds everything again
MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


class Corrupt(Exception):
    """An object of the cache is missing or differs from what was written."""


@dataclass(frozen=True)
class Store:
    """Objects by name, e.g. "folder/file", below a local folder or a URL. Can be pickled."""

    root: str  # a folder, or a URL of anything to which fsspec can write complete objects; it need not rename or append
    local_dir: str  # for copies of objects at a URL, named by their checksums
    read_only: bool = False  # missing objects are not made
    where: str | None = None  # for messages; None: data.cache_dir

    @property
    def remote(self) -> bool:
        return is_url(self.root) and not self.root.startswith("file://")

    def read(self, name: str) -> bytes | None:
        """The object; None if there is none."""
        with self._errors("read"), suppress(FileNotFoundError, NotADirectoryError):
            return self._fs().cat_file(self._url(name))
        return None

    def names(self, folder: str) -> set[str]:
        """The objects directly below a folder; none if it does not exist."""
        with self._errors("read"), suppress(FileNotFoundError, NotADirectoryError):
            self._fs().invalidate_cache()
            return {path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs().ls(self._url(folder), detail=False)}
        return set()

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of each object at any depth below a folder, by its name within the folder; none if it does not exist."""
        with self._errors("read"), suppress(FileNotFoundError, NotADirectoryError):
            fs, url = self._fs(), self._url(folder).rstrip("/")
            fs.invalidate_cache()
            top = fs._strip_protocol(url).rstrip("/") + "/"
            found = fs.find(url, detail=True)
            return {path.removeprefix(top): info["size"] for path, info in found.items() if path.startswith(top)}
        return {}

    def write(self, name: str, data: bytes) -> None:
        """Publishes an object of a store at a URL."""
        with self._errors("write"):
            self._fs().pipe_file(self._url(name), data)

    def upload(self, name: str, file: Path) -> None:
        """Publishes a copy of a file in a store at a URL."""
        with self._errors("write"):
            self._fs().put_file(str(file), self._url(name))

    def download(self, name: str, file: Path) -> None:
        """Copies an object to a file, whose folder is created. If there is no such object, there is no file."""
        with self._errors("read"):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fs().get_file(self._url(name), str(file))
            except FileNotFoundError:
                file.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes an object if it exists."""
        with self._errors("write"), suppress(FileNotFoundError):
            self._fs().rm_file(self._url(name))

    def scratch(self, name: str) -> Path:
        """A new path from which put() can take a file. Removes scratch files of killed processes."""
        with self._errors("write"):
            self._scratch.mkdir(parents=True, exist_ok=True)
            self.clear()
            return self._scratch / f".{name.replace('/', '+')}~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex[:8]}"

    def clear(self) -> None:
        """Removes scratch files of processes of this machine that have ended."""
        for path in self._scratch.glob(f".*~{socket.gethostname()}~*"):
            try:
                os.kill(int(path.name.split("~")[-2]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            except (PermissionError, ValueError):
                continue  # it runs, or the name is none of ours

    @property
    def _scratch(self) -> Path:
        return Path(self.local_dir).expanduser() if self.remote else self._path("")

    def put(self, name: str, file: Path) -> None:
        """Publishes a file, which is moved or removed."""
        with self._errors("write"):
            try:
                _sync(file)
                if self.remote:
                    self._fs().put_file(str(file), self._url(name))
                else:
                    self._path(name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, self._path(name))
                    _sync(self._path(name).parent)
            finally:
                file.unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """What write_json() was given. Raises Corrupt if it is missing, unreadable or changed."""
        return from_json(name, self.read(name))

    def write_json(self, name: str, facts: dict[str, Any]) -> None:
        """Publishes JSON values with their checksum."""
        file = self.scratch(name)
        with self._errors("write"):
            file.write_bytes(to_json(facts))
        self.put(name, file)

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """A local file with the object's contents, of which every byte was checked: the object itself, or a copy.

        Raises Corrupt if it is missing or differs.
        """
        if not self.remote:
            return check_file(self._path(name), size, sha256)
        copy = Path(self.local_dir).expanduser() / sha256[:2] / sha256
        with suppress(Corrupt):
            return check_file(copy, size, sha256)
        file = self.scratch(name)
        try:
            with self._errors("read"):
                copy.parent.mkdir(parents=True, exist_ok=True)
            self.download(name, file)
            check_file(file, size, sha256, name)
            os.replace(file, copy)
        finally:
            file.unlink(missing_ok=True)
        return copy

    def _fs(self) -> Any:
        return fsspec.filesystem(self.root.split("://")[0] if self.remote else "file")

    def _url(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if self.remote else str(self._path(name))

    def _path(self, name: str) -> Path:
        return Path(self.root.removeprefix("file://")).expanduser() / name

    def _errors(self, action: str) -> AbstractContextManager[None]:
        kinds = Exception if self.remote else (OSError, ValueError)  # each file system of fsspec has its own
        return translate_errors(f"{self.where or f'data.cache_dir = {self.root}'}: cannot {action} there", kinds)


def check_file(path: Path, size: int, sha256: str, name: str = "") -> Path:
    """The path, if the file has this size and checksum. Raises Corrupt if not."""
    name = name.rsplit("/", 1)[-1] or path.name
    try:
        found = path.stat().st_size
        if found != size:
            raise Corrupt(f"{name}: {found} bytes instead of {size}")
        if checksum(path)["sha256"] != sha256:
            raise Corrupt(f"{name}: wrong checksum")
    except OSError as error:
        raise Corrupt(f"{name}: {error.strerror}") from None
    return path


def checksum(file: Path) -> dict[str, Any]:
    """The size and checksum of a file, for a manifest."""
    with open(file, "rb") as handle:
        return {"bytes": os.fstat(handle.fileno()).st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_key(settings: list[Any]) -> str:
    """A name for what these settings determine."""
    return digest([FORMAT, *settings])[:32]


def to_json(facts: dict[str, Any]) -> bytes:
    """JSON with its own checksum, without the secrets of URLs."""
    facts = redact(facts)
    return json.dumps({"entry": facts, "sha256": digest(facts)}, indent=1).encode()


def from_json(name: str, data: bytes | None) -> dict[str, Any]:
    """What to_json() was given. Raises Corrupt if data is None, unreadable or changed."""
    name = name.rsplit("/", 1)[-1]
    if data is None:
        raise Corrupt(f"{name}: No such file or directory")
    try:
        read = json.loads(data)
        facts, sha256 = read["entry"], read["sha256"]
    except (ValueError, KeyError, TypeError):
        raise Corrupt(f"{name}: unreadable") from None
    if not isinstance(facts, dict) or sha256 != digest(facts):
        raise Corrupt(f"{name}: wrong checksum")
    return facts


def cached_files(
    store: Store, kind: str, settings: list[Any], files: list[str], write: Callable[[Path], dict[str, Any]]
) -> list[Path]:
    """Local paths of small files that belong together, made if they are missing or corrupt.

    They are kept in a folder named by `kind` and by settings (JSON values) that determine every byte of them. write(folder)
    writes the named files to a temporary folder and returns facts, as JSON values, to keep with them.

    Raises ConfigError if the store cannot be used, Corrupt if it is read-only and a file is missing or corrupt.
    """
    folder = f"{kind}-{cache_key(settings)}"

    def fetch() -> list[Path]:
        stored = store.read_json(f"{folder}/{MANIFEST}")["files"]
        return [store.fetch(f"{folder}/{name}", stored[name]["bytes"], stored[name]["sha256"]) for name in files]

    try:
        return fetch()
    except Corrupt as error:
        if store.read_only:
            raise
        if MANIFEST in store.names(folder):
            _log.warning("the cache %s/%s is corrupt and is built again: %s", store.root, folder, error)
    temporary = store.scratch(f"{folder}/new")
    try:
        with translate_errors(f"data.cache_dir = {store.root}: cannot write there", OSError):
            temporary.mkdir()
            facts = write(temporary) | {"files": {name: checksum(temporary / name) for name in files}}
        for name in files:
            store.put(f"{folder}/{name}", temporary / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    store.write_json(f"{folder}/{MANIFEST}", facts)
    with translate_errors(f"data.cache_dir = {store.root}: corrupt directly after it was written there", Corrupt):
        return fetch()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
