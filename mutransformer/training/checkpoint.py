"""What a run saves and resumes from: state, data position and resolved config, as one atomic Orbax checkpoint.

Orbax publishes a checkpoint atomically, but does not notice what happens to it on disk afterwards, such as a flipped bit. So each
checkpoint carries SHA-256 checksums of its files. A corrupt one is logged, renamed, and the previous one loaded.
"""

import hashlib
import json
import logging
import os
import time
from contextlib import AbstractContextManager
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mutransformer.config.load import check_not_renamed
from mutransformer.config.schema import Config, flatten, may_change_on_resume
from mutransformer.errors import ConfigError, check, first_line, translate_errors
from mutransformer.training.program import TrainState

ITEMS = ("state", "run")  # the folders in a checkpoint
CHECKSUMS = "sha256.json"  # in a checkpoint: the checksum of each of its other files
NOT_CHECKED = (CHECKSUMS, "_CHECKPOINT_METADATA")  # Orbax writes times into the latter at the very end

_log = logging.getLogger(__name__)
_loss_of = itemgetter("loss")


class Checkpoints:
    """The checkpoints in a run's folder. Saving continues in the background: call wait() or close() before the process ends."""

    def __init__(self, config: Config, *, read_only: bool = False):
        """read_only: create and remove nothing. Raises ConfigError if the folder cannot be created or read."""
        self._config, self._read_only = config, read_only
        self.directory = (config.rundir / "checkpoints").absolute()
        keep: list[Any] = [LatestN(config.checkpoint.keep)]
        if n := config.checkpoint.keep_best:
            keep.append(BestN(get_metric_fn=_loss_of, reverse=True, n=n, keep_checkpoints_without_metrics=False))
        exists = self.directory.is_dir()
        check(exists or not read_only, f"{self.directory}: no checkpoints here")
        check(exists or not os.path.lexists(self.directory), f"{self.directory}: not a folder, checkpoints need a folder there")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(keep),
            best_fn=_loss_of,  # without best_fn Orbax keeps losses in memory only
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        with translate_errors(f"{self.directory}: cannot be used for checkpoints", (OSError, ValueError)):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The step (updates completed) of the latest intact checkpoint; None if there are no checkpoints.

        Later ones that are corrupt are logged and, unless read_only, renamed, so that their steps can be saved again. Raises
        ConfigError if there are checkpoints, and all are corrupt.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        found: int | None = None
        if jax.process_index() == 0:  # reads and verifies the files for all processes
            found, corrupt = self._first_intact(steps)
            if found is not None and not self._read_only:
                for step in corrupt:
                    self._path(step).rename(self.directory / f"corrupt-{step}-{time.time_ns()}")
        if jax.process_count() > 1:
            shared = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
            found = None if shared < 0 else shared
        message = f"{self.directory}: every checkpoint here is corrupt; move the folder away to start from scratch"
        check(found is not None or not steps, message)
        self._manager.reload()
        return found

    def best(self) -> int | None:
        """The intact checkpoint with the lowest validation loss; None if none was evaluated. Corrupt ones are logged."""
        losses = {step: loss for step in self._manager.all_steps() if (loss := self.loss(step)) is not None}
        return self._first_intact(sorted(losses, key=losses.__getitem__))[0]

    def chosen(self) -> int:
        """The checkpoint that eval.checkpoint names. Raises ConfigError if there is none."""
        step = self.latest() if self._config.eval.checkpoint == "latest" else self.best()
        if step is None:
            raise ConfigError(f"{self.directory}: holds no checkpoint, or none with a validation loss")
        return step

    def loss(self, step: int) -> float | None:
        """The validation loss at a checkpoint, if it was evaluated."""
        return (self._manager.metrics(step) or {}).get("loss")

    def check_same(self, step: int, data: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model, optimizer or data. data: the fingerprint of this run's.

        Raises ConfigError, which lists the settings that differ, with the checkpoint's value and this run's.
        """
        saved = self._run(step)
        check_not_renamed(saved["config"], str(self._path(step)))
        allowed, ours = self._config.checkpoint.allow, flatten(self._config)
        theirs = flatten(Config()) | saved["config"]  # settings that are newer than the checkpoint: defaults
        for key in ("tokens", "tokenizer"):  # the rest of a fingerprint has config keys of its own
            ours[f"fingerprint.{key}"], theirs[f"fingerprint.{key}"] = data[key], saved["data"].get(key)
        differing = [
            f"{key} was {theirs.get(key)}, is {ours.get(key)}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and not may_change_on_resume(key) and key not in allowed
        ]
        unknown = sorted(set(allowed) - ours.keys())
        check(not unknown, f"checkpoint.allow: no such key: {', '.join(unknown)}")
        check(
            not differing,
            f"{self._path(step)} belongs to another run: {'; '.join(differing)}. "
            "Choose another name=..., or list keys that may change in checkpoint.allow",
        )

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState[Array], dict[str, Any]]:
        """The state, sharded over this run's mesh, and the position of its data iterator. shapes: Program.state.

        Raises ConfigError if the checkpoint cannot be read, or holds other arrays.
        """
        with translate_errors(f"{self._path(step)}: cannot be restored", (OSError, ValueError, KeyError)):
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))
        return restored["state"], self._run(step)["position"]

    def save(self, state: TrainState[Array], position: dict[str, Any], data: dict[str, Any], loss: float | None) -> None:
        """Starts saving in the background; does nothing if the step is saved already. The state is copied before this returns.

        data: its fingerprint. loss: on validation, if this step was evaluated; decides which checkpoints are the best. Raises
        ConfigError if this save or the previous one failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        run = {"config": flatten(self._config), "data": data, "position": position}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        with self._saving():
            self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})

    def poll(self) -> None:
        """Raises ConfigError if a background save has failed."""
        with self._saving():
            self._manager.check_for_errors()

    def stop_requested(self, step: int) -> bool:
        """Whether the scheduler of a multi-process job sent SIGTERM to a process; all processes agree on the step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises ConfigError if saving failed."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the background work. Call wait() first to surface pending errors."""
        self._manager.close()

    def _run(self, step: int) -> dict[str, Any]:
        """What is saved beside the state: config, data fingerprint, position."""
        kinds = OSError, ValueError, KeyError, TypeError, AssertionError
        with translate_errors(f"{self._path(step)}: cannot be read", kinds):
            run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
            assert isinstance(run["config"], dict) and isinstance(run["data"], dict)
            assert isinstance(run["position"]["next_index"], int)
        return run

    def _saving(self) -> AbstractContextManager[None]:
        return translate_errors(f"{self.directory}: saving a checkpoint failed", (OSError, ValueError))

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _first_intact(self, steps: list[int]) -> tuple[int | None, list[int]]:
        """The first of these checkpoints that is intact, and the corrupt ones before it, which are logged."""
        for i, step in enumerate(steps):
            reason = _corruption(self._path(step))
            if reason is None:
                return step, steps[:i]
            _log.warning("%s is corrupt: %s", self._path(step), reason)
        return None, steps

    def _write_checksums(self) -> None:
        """Called by Orbax, in its thread, when all files of a checkpoint are written and before it gets its final name."""
        if jax.process_index() == 0:
            for folder in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder)), encoding="utf-8")


def _checksums(folder: Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in NOT_CHECKED:
            with path.open("rb") as file:
                checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums


def _corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if it is intact."""
    missing = [item for item in ITEMS if not (folder / item).is_dir()]
    if missing:
        return f"lacks {', '.join(missing)}"
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        actual = _checksums(folder)
        differing = sorted(name for name in expected if actual.get(name) != expected[name])
    except (OSError, ValueError, TypeError) as error:
        return first_line(error)
    return f"{differing[0]}: checksum mismatch" if differing else None
