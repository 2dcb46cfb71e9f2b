"""Where checkpoints are kept: in a folder on a disk that all processes see.

Orbax publishes a checkpoint atomically, but does not notice what happens to it on disk afterwards, such as a flipped bit. So each
one carries its step and SHA-256 checksums of its files, and nothing of it is used before they are compared.
mutransformer.training.url_checkpoints keeps them at a URL.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mutransformer.errors import check, first_line, translate_errors
from mutransformer.training.run_folder import RunFolder

FOLDER = "checkpoints"  # in a run's folder
ITEMS = ("state", "run")  # the folders in a checkpoint
CHECKSUMS = "sha256.json"  # in a checkpoint: its step, and the checksum of each of its other files
NOT_CHECKED = (CHECKSUMS, "_CHECKPOINT_METADATA")  # Orbax writes times into the latter at the very end
THREADS = 8  # that compute checksums or move files

_log = logging.getLogger(__name__)


class DiskStorage:
    """The checkpoints of a run. `manager` writes and reads them; it is opened anew after a failed save."""

    primary_host: int | None = 0  # the process that completes what all of them wrote; None: each writes for itself
    one_file_per_shard = False

    def __init__(self, folder: RunFolder, read_only: bool) -> None:
        """read_only: create and remove nothing. Raises ConfigError if the folder cannot be created or read."""
        self.directory = (folder.path / FOLDER).absolute()
        self.name = f"{folder.name}/{FOLDER}"  # for messages
        self.read_only = read_only
        check(self.exists() or not read_only, f"{self.name}: no checkpoints here")
        unusable = not self.exists() and os.path.lexists(self.directory)
        check(not unusable, f"{self.name}: not a folder, checkpoints need a folder there")
        self.open()

    def open(self) -> None:
        """Opens the manager. Raises ConfigError if the folder cannot be created or read."""
        processes = ocp.options.MultiprocessingOptions(primary_host=self.primary_host)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=not self.read_only,
            read_only=self.read_only,
            create=self.primary_host is not None and not self.read_only,
            multiprocessing_options=processes,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal_all),
        )
        state = ocp.StandardCheckpointHandler(use_ocdbt=not self.one_file_per_shard, multiprocessing_options=processes)
        handlers = {"state": state, "run": ocp.JsonCheckpointHandler(multiprocessing_options=processes)}
        with translate_errors(f"{self.name}: cannot be used for checkpoints", (OSError, ValueError)):
            self.manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def exists(self) -> bool:
        """Whether there is a folder for checkpoints."""
        return self.directory.is_dir()

    def steps(self) -> set[int]:
        """The steps (updates completed) of all checkpoints, whether intact or not."""
        return set(self.manager.all_steps())

    def path(self, step: int) -> Path:
        """The folder of a checkpoint on this machine."""
        return self.directory / str(step)

    def fault(self, step: int, shapes: Any = None) -> str | None:
        """What is wrong with a checkpoint; None if it is intact.

        shapes: the state to be restored, arrays by shape and sharding, where other files need not be read; None: all are read.
        """
        return _corruption(self.path(step))

    def first_intact(self, steps: Iterable[int], shapes: Any = None) -> tuple[int | None, list[int]]:
        """The first of these that is intact in all processes, and the corrupt ones before it, which are logged."""
        corrupt = list[int]()
        for step in steps:
            reads = self.primary_host in (None, jax.process_index())
            reason = self.fault(step, shapes) if reads else None
            if reason is not None:
                _log.warning("%s/%d is corrupt: %s", self.name, step, reason)
            wrong = np.bool_(reason is not None)
            if not (multihost_utils.process_allgather(wrong).any() if jax.process_count() > 1 else wrong):
                return step, corrupt
            corrupt.append(step)
        return None, corrupt

    def set_aside(self, steps: Iterable[int]) -> None:
        """Makes corrupt checkpoints such that they no longer count, so that their steps can be saved again."""
        if jax.process_index() == 0:
            for step in steps:
                self.path(step).rename(self.directory / f"corrupt-{step}-{time.time_ns()}")

    def remove(self, steps: Iterable[int]) -> None:
        """Removes checkpoints."""
        for step in steps:
            self.manager.delete(step)

    def _seal_all(self) -> None:
        """Called by Orbax, in its thread, when all files of a checkpoint are written and before it gets its final name."""
        for folder in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            self._seal(int(folder.name.partition(".")[0]), folder)

    def _seal(self, step: int, folder: Path) -> None:
        if jax.process_index() == 0:
            seal = {"step": step, "files": _checksums(folder)}
            (folder / CHECKSUMS).write_text(json.dumps(seal), encoding="utf-8")


def _checksums(folder: Path) -> dict[str, str]:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = [name for name in paths if name not in NOT_CHECKED]
    with ThreadPoolExecutor(THREADS) as pool:  # hashlib lets other threads run meanwhile
        return dict(zip(names, pool.map(lambda name: _checksum(paths[name]), names), strict=True))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _corruption(folder: Path) -> str | None:
    if folder.is_symlink():
        return "is a link"
    missing = [item for item in ITEMS if not (folder / item).is_dir()]
    if missing:
        return f"lacks {', '.join(missing)}"
    try:
        seal: dict[str, Any] = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected, step = seal["files"], seal["step"]
        actual = _checksums(folder)
        differing = sorted(name for name in expected if actual.get(name) != expected[name])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS}: {first_line(error)}"
    if differing:
        return f"{differing[0]}: checksum mismatch"
    return None if step == int(folder.name) else f"is of step {step}"
