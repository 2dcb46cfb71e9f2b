"""A cache of folders on disk, which any number of processes may build and read at once.

What decides an entry is hashed into the name of its folder. An entry is complete or absent: it is written beside its place and
renamed. Every byte is checked whenever it is opened, and a damaged entry is built again.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutransformer.config import ConfigError

_FORMAT = 1  # of the manifest and the files; another number builds every entry again
_MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    folder: Path
    facts: dict[str, Any]  # what its writer told about it
    sha256: dict[str, str]  # of each file


class _Damaged(Exception):
    """An entry is missing, or is not as it was written."""


def entry(root: Path, kind: str, settings: list[str | int], files: list[str], write: Callable[[Path], dict[str, Any]]) -> Entry:
    """The entry of that kind for these settings, built if it is missing or damaged.

    Args:
        root: the cache's folder.
        kind: the first part of the entry's name.
        settings: what decides the contents.
        files: the names of the files that make an entry.
        write: writes them to the folder that it is given and returns facts to keep with them, as JSON can hold.

    Raises:
        ConfigError: the cache's folder cannot be written.
    """
    key = hashlib.sha256(json.dumps([_FORMAT, *settings]).encode()).hexdigest()
    folder = root / f"{kind}-{key[:32]}"
    try:
        if folder.exists():
            try:
                return _read(folder, files)
            except _Damaged as error:
                _log.warning("the cache %s is damaged and is built again: %s", folder, error)
        temporary = root / f".{folder.name}-{uuid.uuid4().hex}"
        aside = root / f"{temporary.name}-damaged"
        try:
            temporary.mkdir(parents=True)
            _write_manifest(temporary, files, write(temporary))
            # Another process may have been faster: its entry is as good, and may be in use.
            with suppress(_Damaged):
                return _read(folder, files)
            if folder.exists():
                folder.rename(aside)
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
        return _read(folder, files)
    except _Damaged as error:
        raise ConfigError(f"data.cache_dir = {root}: what was just written there is damaged: {error}") from None
    except OSError as error:
        raise ConfigError(f"data.cache_dir = {root}: cannot write there: {error.strerror}") from None


def _read(folder: Path, files: list[str]) -> Entry:
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        if manifest["sha256"] != _digest(manifest["entry"]):
            raise _Damaged(f"{_MANIFEST}: not as it was written")
        facts, sizes, sha256 = (manifest["entry"][key] for key in ("facts", "bytes", "sha256"))
        for name in files:
            with open(folder / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != sizes[name]:
                    raise _Damaged(f"{name}: {size} bytes instead of {sizes[name]}")
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256[name]:
                    raise _Damaged(f"{name}: not as it was written")
    except OSError as error:
        raise _Damaged(f"{Path(error.filename).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise _Damaged(f"{_MANIFEST}: unreadable") from None
    return Entry(folder, facts, sha256)


def _write_manifest(folder: Path, files: list[str], facts: dict[str, Any]) -> None:
    written: dict[str, Any] = {"facts": facts, "bytes": {}, "sha256": {}}
    for name in files:
        with open(folder / name, "rb") as file:
            written["bytes"][name] = os.fstat(file.fileno()).st_size
            written["sha256"][name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with open(folder / _MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"entry": written, "sha256": _digest(written)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, folder: Path) -> None:
    _sync(temporary)
    try:
        temporary.rename(folder)
    except OSError:
        # Either another process put its entry there in between, or the rename is impossible.
        if not folder.exists():
            raise
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
