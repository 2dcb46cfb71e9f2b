"""A file system for fsspec that behaves like an object store: whole objects only, no rename, no append, no folders of their own.

It lies in a folder, so that several processes see the same objects. `install` makes fsspec find it in every process to come.
"""

import io
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
from fsspec.spec import AbstractFileSystem

HIDDEN = ".upload-"  # begins the name of a file that is no object yet


class ObjectStore(AbstractFileSystem):
    protocol = "objects"
    cachable = False

    def _name(self, path: str) -> str:
        return str(self._strip_protocol(path))

    def _file(self, path: str) -> Path:
        return Path(os.environ["OBJECT_STORE"]) / self._name(path).lstrip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        file = self._file(path)
        if file.is_file():
            return {
                "name": self._name(path),
                "size": file.stat().st_size,
                "type": "file",
                "etag": file.stat().st_mtime_ns,
            }
        if file.is_dir():
            return {"name": self._name(path), "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        file, name = self._file(path), self._name(path).rstrip("/")
        if not file.is_dir():
            raise FileNotFoundError(path)
        found = [self.info(f"{name}/{below.name}") for below in sorted(file.iterdir()) if not below.name.startswith(HIDDEN)]
        return found if detail else [entry["name"] for entry in found]

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        if mode == "rb":
            return open(self._file(path), "rb")
        if mode != "wb":
            raise NotImplementedError(f"an object cannot be opened with {mode}")
        return _Upload(self._file(path))

    def mv(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("an object cannot be renamed")

    def rm_file(self, path: str) -> None:
        self._file(path).unlink()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        return None


class _Upload(io.BytesIO):
    """An object that appears when it is complete."""

    def __init__(self, file: Path):
        super().__init__()
        self._to = file

    def close(self) -> None:
        if not self.closed:
            self._to.parent.mkdir(parents=True, exist_ok=True)
            hidden = self._to.with_name(f"{HIDDEN}{uuid4()}")
            hidden.write_bytes(self.getvalue())
            hidden.rename(self._to)
        super().close()


def install(folder: Path) -> dict[str, str]:
    """Registers it in this process; returns what other processes need in their environment."""
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    found = folder / "object_store-0.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: object-store\nVersion: 0\n")
    (found / "entry_points.txt").write_text("[fsspec.specs]\nobjects = object_store:ObjectStore\n")
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"OBJECT_STORE": str(folder / "objects"), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
