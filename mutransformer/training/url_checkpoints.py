"""Checkpoints at a URL: each process uploads the files of its own shards, and copies what it restores.

Nothing can be renamed there, so a checkpoint counts when each process has written its seal, after all of its other files.
"""

import itertools
import json
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from mutransformer.data.cache.store import Corrupt, check_file, checksum
from mutransformer.errors import first_line
from mutransformer.training.checkpoint_storage import FOLDER, THREADS, DiskStorage
from mutransformer.training.run_folder import RunFolder
from mutransformer.training.url_folder import UrlFolder

_CHUNK = re.compile(r"state/[^/]+/[0-9.]+")  # a file that holds a part of an array, named by its place in the grid of parts
SEAL = "sha256.{}-of-{}.json"  # process and number of processes: the step, and size and checksum of each file that it wrote


def storage(folder: RunFolder, read_only: bool) -> DiskStorage:
    """Where the checkpoints of a run are kept. Raises ConfigError as DiskStorage does."""
    return UrlStorage(folder, read_only) if isinstance(folder, UrlFolder) else DiskStorage(folder, read_only)


class UrlStorage(DiskStorage):
    """The checkpoints of a run at a URL, checkpoints/STEP/... `directory` has copies of those that are written or restored."""

    primary_host = None
    one_file_per_shard = True

    def __init__(self, folder: UrlFolder, read_only: bool) -> None:
        """Raises ConfigError if the URL cannot be read."""
        self._folder, self._store = folder, folder.store
        files = self._files()
        self._complete = {step for step, names in files.items() if _seals(names)}
        super().__init__(folder, read_only)
        if not read_only:  # of saves that were interrupted
            self._remove_files({step: names for step, names in files.items() if step not in self._complete})

    def open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        super().open()

    def exists(self) -> bool:
        return bool(self._complete) or not self.read_only

    def steps(self) -> set[int]:
        return set(self._complete)

    def fault(self, step: int, shapes: Any = None) -> str | None:
        """As of a disk. The files that are read are copied to this machine, if all of them are intact."""
        files = dict[str, dict[str, Any]]()
        for name in _seals(self._files().get(step, set())):
            try:
                seal = json.loads(self._store.read(f"{FOLDER}/{step}/{name}") or b"")
                files |= {name: {"size": int(of["bytes"]), "sha256": str(of["sha256"])} for name, of in seal["files"].items()}
                if seal["step"] != step:
                    return f"is of step {seal['step']}"
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                return f"{name}: {first_line(error)}"

        def copy(name: str) -> None:
            self._store.download(f"{FOLDER}/{step}/{name}", self.path(step) / name)
            try:
                check_file(self.path(step) / name, **files[name])
            except Corrupt as error:
                raise Corrupt(f"{name}: {str(error).partition(': ')[2]}") from None

        chunks = {name for name in files if _CHUNK.fullmatch(name)}
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(copy, files.keys() - chunks))
                list(pool.map(copy, chunks if shapes is None else _needed(chunks, shapes, self.path(step) / "state")))
        except Corrupt as error:
            shutil.rmtree(self.path(step), ignore_errors=True)
            return str(error)
        return None if files else "lacks the seal of a process"

    def set_aside(self, steps: Iterable[int]) -> None:
        files = self._files()
        self._remove_files({step: {name for name in files[step] if name.startswith("sha256.")} for step in steps})
        self._complete -= set(steps)

    def remove(self, steps: Iterable[int]) -> None:
        """Removes checkpoints at the URL, and here all but the latest."""
        files, steps = self._files(), set(steps)
        self._remove_files({step: files.get(step, set()) for step in steps})
        self._complete -= steps
        super().remove(set(self.manager.all_steps()) - {max(self._complete, default=-1)})

    def _seal(self, step: int, folder: Path) -> None:
        """Uploads what this process wrote. What the run wrote before is published first, so that it can resume from there."""
        self._folder.check_present()
        self._folder.publish()
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        # What is not in the folder of an array is the same for all processes.
        own = {name: path for name, path in paths.items() if jax.process_index() == 0 or name.count("/") > 1}

        def upload(name: str) -> dict[str, Any]:
            self._store.upload(f"{FOLDER}/{step}/{name}", own[name])
            return checksum(own[name])

        with ThreadPoolExecutor(THREADS) as pool:
            seal = {"step": step, "files": dict(zip(own, pool.map(upload, own), strict=True))}
        name = SEAL.format(jax.process_index(), jax.process_count())
        self._store.write(f"{FOLDER}/{step}/{name}", json.dumps(seal).encode())
        self._complete.add(step)

    def _files(self) -> dict[int, set[str]]:
        """The names of the files of each checkpoint at the URL, whether complete or not."""
        names = dict[int, set[str]]()
        for path in self._store.sizes(FOLDER):
            step, _, name = path.partition("/")
            if step.isdecimal() and name:
                names.setdefault(int(step), set()).add(name)
        return names

    def _remove_files(self, files: dict[int, set[str]]) -> None:
        """By process 0, and the seals first: what is left counts no more if that is interrupted."""
        if jax.process_index() == 0:
            for step, names in files.items():
                for name in sorted(names, key=lambda name: not name.startswith("sha256.")):
                    self._store.remove(f"{FOLDER}/{step}/{name}")


def _needed(chunks: set[str], shapes: Any, folder: Path) -> set[str]:
    """Of the chunks of all arrays, those that overlap the shards of this process's devices.

    folder: holds a folder for each array, with its chunks' shape in .zarray. Raises Corrupt if that cannot be read.
    """
    needed = set[str]()
    for path, array in jax.tree.leaves_with_path(shapes):
        name = ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
        try:
            chunk = json.loads((folder / name / ".zarray").read_text())["chunks"]
        except (OSError, ValueError, KeyError) as error:
            raise Corrupt(f"state/{name}: {first_line(error)}") from None
        for index in array.sharding.addressable_devices_indices_map(array.shape).values():
            bounds = [part.indices(n)[:2] for part, n in zip(index, array.shape, strict=True)]
            places = [range(start // c, -(-stop // c)) for (start, stop), c in zip(bounds, chunk, strict=True)]
            needed |= {f"state/{name}/{'.'.join(map(str, place or (0,)))}" for place in itertools.product(*places)}
    return needed & chunks


def _seals(names: set[str]) -> list[str]:
    """The seals of a checkpoint if those of all processes are there, else none."""
    for name in names:
        process, _, count = name.removeprefix("sha256.").removesuffix(".json").partition("-of-")
        if process == "0" and count.isdecimal():
            seals = [SEAL.format(process, count) for process in range(int(count))]
            if names.issuperset(seals):
                return seals
    return []
