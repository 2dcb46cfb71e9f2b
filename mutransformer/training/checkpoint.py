"""What a run saves and resumes from: state, data position and resolved config, as one atomic Orbax checkpoint.

Orbax publishes a checkpoint atomically, but does not notice what happens to it on disk afterwards, such as a flipped bit. So each
checkpoint carries its step and SHA-256 checksums of its files, and nothing of it is used before they are compared. A corrupt one
is logged, renamed, and the previous one loaded. Validation losses are kept beside the checkpoints: a step is saved before it is
evaluated.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jax.experimental import multihost_utils

from mutransformer.config.load import check_not_renamed
from mutransformer.config.schema import Config, flatten, may_change_on_resume
from mutransformer.errors import ConfigError, check, first_line, translate_errors
from mutransformer.training.program import TrainState
from mutransformer.training.run_folder import RunFolder

ITEMS = ("state", "run")  # the folders in a checkpoint
CHECKSUMS = "sha256.json"  # in a checkpoint: its step, and the checksum of each of its other files
NOT_CHECKED = (CHECKSUMS, "_CHECKPOINT_METADATA")  # Orbax writes times into the latter at the very end
LOSSES = "validation_losses.json"  # beside the checkpoints: {step: loss}

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a run's folder. Saving continues in the background: call wait() or close() before the process ends."""

    def __init__(self, config: Config, *, read_only: bool = False):
        """read_only: create and remove nothing. Raises ConfigError if the folder cannot be created or read."""
        self._config, self._read_only = config, read_only
        self.directory = (config.rundir / "checkpoints").absolute()
        self._files = RunFolder(self.directory)
        self._failure: str | None = None  # of the latest save
        exists = self.directory.is_dir()
        check(exists or not read_only, f"{self.directory}: no checkpoints here")
        check(exists or not os.path.lexists(self.directory), f"{self.directory}: not a folder, checkpoints need a folder there")
        self._manager = self._open()
        self._losses = _read_losses(self.directory / LOSSES)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            create=not self._read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        with translate_errors(f"{self.directory}: cannot be used for checkpoints", (OSError, ValueError)):
            return ocp.CheckpointManager(self.directory, options=options)

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
        evaluated = [step for step in self._manager.all_steps() if self.loss(step) is not None]
        return self._first_intact(sorted(evaluated, key=self._losses.__getitem__))[0]

    def chosen(self) -> int:
        """The checkpoint that eval.checkpoint names. Raises ConfigError if there is none."""
        step = self.latest() if self._config.eval.checkpoint == "latest" else self.best()
        if step is None:
            raise ConfigError(f"{self.directory}: holds no checkpoint, or none with a validation loss")
        return step

    def loss(self, step: int) -> float | None:
        """The validation loss at a checkpoint, if it was evaluated."""
        return self._losses.get(step)

    def record_loss(self, step: int, loss: float) -> None:
        """Notes the validation loss of a step, which decides on the best checkpoints."""
        kept = {*self._manager.all_steps(), step}
        self._losses = {at: of for at, of in {**self._losses, step: loss}.items() if at in kept}
        if jax.process_index() == 0:
            try:
                self._files.write(LOSSES, json.dumps(self._losses).encode())
            except OSError as error:
                text = "%s: the validation loss of step %d cannot be written: %s"
                _log.warning(text, self.directory, step, first_line(error))

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

    def save(self, state: TrainState[Array], position: dict[str, Any], data: dict[str, Any], probe: float | None = None) -> None:
        """Starts saving in the background; does nothing if the step is saved already. The state is copied before this returns.

        data: its fingerprint. probe: the state's loss on text that a resumed run can score again. Removes the checkpoints that
        neither checkpoint.keep nor keep_best keeps. A failure is logged, and does not end a run of one process: the next save may
        succeed, and wait() tells if none did. Of several processes it raises ConfigError, since the others do not know of it.
        """
        self._settle()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        run = {"config": flatten(self._config), "data": data, "position": position, "probe": probe}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        try:
            self._prune()
            self._failure = None
            self._manager.save(step, args=args)
        except (OSError, ValueError) as error:
            self._failed(error)

    def poll(self) -> None:
        """Logs a background save that has failed, as save() does."""
        try:
            self._manager.check_for_errors()
        except (OSError, ValueError) as error:
            self._failed(error)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises ConfigError if the latest save failed."""
        self._settle()
        check(self._failure is None, f"{self._failure}")
        self._prune()

    def _settle(self) -> None:
        """Waits for the save that is under way; logs it if it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failure = f"{self.directory}: saving a checkpoint failed: {first_line(error)}; {_free(self.directory)}"
        check(jax.process_count() == 1, self._failure)
        _log.warning("%s; the run goes on, and tries again when the next checkpoint is due", self._failure)
        self._manager = self._open()  # the one that failed counts the step as saved

    def _prune(self) -> None:
        """Removes all checkpoints but the latest and the best, as many as the config says."""
        c, steps = self._config.checkpoint, sorted(self._manager.all_steps())
        evaluated = sorted((step for step in steps if step in self._losses), key=self._losses.__getitem__)
        for step in set(steps) - {*steps[-c.keep :], *evaluated[: c.keep_best]}:
            self._manager.delete(step)

    def close(self) -> None:
        """Ends the background work. Call wait() first to surface pending errors."""
        self._manager.close()

    def settings(self, step: int) -> dict[str, Any]:
        """The settings, by dotted key, of the run that saved a checkpoint."""
        return self._run(step)["config"]

    def probe(self, step: int) -> float | None:
        """The loss that was saved beside a state, to be compared with that of the restored one."""
        return self._run(step).get("probe")

    def faults(self) -> dict[int, str | None]:
        """What is wrong with each checkpoint, by step; None: it is intact. Reads all of their files."""
        return {step: _corruption(self._path(step)) for step in sorted(self._manager.all_steps())}

    def _run(self, step: int) -> dict[str, Any]:
        """What is saved beside the state: config, data fingerprint, position."""
        kinds = OSError, ValueError, KeyError, TypeError, AssertionError
        with translate_errors(f"{self._path(step)}: cannot be read", kinds):
            run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
            assert isinstance(run["config"], dict) and isinstance(run["data"], dict)
            assert isinstance(run["position"]["next_index"], int)
        return run

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
                step = int(folder.name.partition(".")[0])
                seal = {"step": step, "files": _checksums(folder)}
                (folder / CHECKSUMS).write_text(json.dumps(seal), encoding="utf-8")


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
    if folder.is_symlink():
        return "is a link"
    missing = [item for item in ITEMS if not (folder / item).is_dir()]
    if missing:
        return f"lacks {', '.join(missing)}"
    try:
        seal = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected, step = seal["files"], seal["step"]
        actual = _checksums(folder)
        differing = sorted(name for name in expected if actual.get(name) != expected[name])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS}: {first_line(error)}"
    if differing:
        return f"{differing[0]}: checksum mismatch"
    return None if step == int(folder.name) else f"is of step {step}"


def _read_losses(path: Path) -> dict[int, float]:
    """The validation losses by step; none, with a warning, if the file is damaged."""
    try:
        return {int(step): float(loss) for step, loss in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be read, so the best checkpoint is not known: %s", path, first_line(error))
        return {}


def _free(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free / 1e9:.2f} GB are free there"
    except OSError as error:
        return first_line(error)
