"""What a run saves and resumes from: state, data position and resolved config, as one atomic Orbax checkpoint.

A corrupt checkpoint is logged, set aside, and the previous one loaded. Validation losses are kept beside the checkpoints: a step
is saved before it is evaluated.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax import Array

from mutransformer.config.load import check_not_renamed
from mutransformer.config.schema import Config, flatten, may_change_on_resume
from mutransformer.errors import ConfigError, check, first_line, translate_errors
from mutransformer.sharding.processes import all_processes
from mutransformer.training.program import TrainState
from mutransformer.training.run_folder import RunFolder
from mutransformer.training.url_checkpoints import storage

# Of the settings of data, those that do not change what is read.
WITHOUT_EFFECT = {f"data.{name}" for name in ("cache_dir", "cache_is_shared", "local_dir", "prefetch", "threads", "workers")}
WITHOUT_EFFECT.add("data.tokenize_workers")
LOSSES = "validation_losses.json"  # beside the checkpoints: {step: loss}

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a run's folder. Saving continues in the background: call wait() or close() before the process ends."""

    def __init__(self, config: Config, folder: RunFolder, *, read_only: bool = False):
        """folder: the run's. read_only: create and remove nothing. Raises ConfigError if it cannot be created or read."""
        self._config = config
        self._storage = storage(folder, read_only)
        self.name = self._storage.name  # for messages
        self._failure: str | None = None  # of the latest save
        self._files = RunFolder(self._storage.directory)
        self._losses = _read_losses(self._storage.directory / LOSSES)

    def latest(self, shapes: TrainState | None = None) -> int | None:
        """The step (updates completed) of the latest intact checkpoint; None if there are no checkpoints.

        shapes: Program.state, if that is all that will be restored: at a URL each process then reads only what its devices need.

        Later ones that are corrupt are logged and, unless read_only, set aside, so that their steps can be saved again. Raises
        ConfigError if there are checkpoints, and all are corrupt.
        """
        steps = sorted(self._storage.steps(), reverse=True)
        found, corrupt = self._storage.first_intact(steps, shapes)
        message = f"{self.name}: every checkpoint here is corrupt; move the folder away to start from scratch"
        check(found is not None or not steps, message)
        if corrupt and not self._storage.read_only:
            with all_processes().first_in_process_0("the corrupt checkpoints"):
                self._storage.set_aside(corrupt)
        self._storage.manager.reload()
        return found

    def best(self, shapes: TrainState | None = None) -> int | None:
        """As latest(), the one with the lowest validation loss; None if none was evaluated. Corrupt ones are logged."""
        evaluated = [step for step in self._storage.steps() if self.loss(step) is not None]
        found, _ = self._storage.first_intact(sorted(evaluated, key=self._losses.__getitem__), shapes)
        self._storage.manager.reload()
        return found

    def chosen(self, shapes: TrainState | None = None) -> int:
        """The checkpoint that eval.checkpoint names, as latest(). Raises ConfigError if there is none."""
        step = self.latest(shapes) if self._config.eval.checkpoint == "latest" else self.best(shapes)
        if step is None:
            raise ConfigError(f"{self.name}: holds no checkpoint, or none with a validation loss")
        return step

    def loss(self, step: int) -> float | None:
        """The validation loss at a checkpoint, if it was evaluated."""
        return self._losses.get(step)

    def record_loss(self, step: int, loss: float) -> None:
        """Notes the validation loss of a step, which decides on the best checkpoints."""
        kept = {*self._storage.steps(), step}
        self._losses = {at: of for at, of in {**self._losses, step: loss}.items() if at in kept}
        if jax.process_index() == 0:
            try:
                self._files.write(LOSSES, json.dumps(self._losses).encode())
            except OSError as error:
                text = "%s: the validation loss of step %d cannot be written: %s"
                _log.warning(text, self.name, step, first_line(error))

    def check_same(self, step: int, data: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model, optimizer or data. data: the fingerprint of this run's.

        Raises ConfigError, which lists the settings that differ, with the checkpoint's value and this run's.
        """
        saved = self._run(step)
        check_not_renamed(saved["config"], self._at(step))
        allowed, ours = self._config.checkpoint.allow, flatten(self._config)
        theirs = flatten(Config()) | saved["config"]  # settings that are newer than the checkpoint: defaults
        for key in ("tokens", "tokenizer"):  # the rest of a fingerprint has config keys of its own
            ours[f"fingerprint.{key}"], theirs[f"fingerprint.{key}"] = data[key], saved["data"].get(key)
        differing = [
            _difference(key, theirs, ours)
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and not may_change_on_resume(key) and key not in allowed
        ]
        unknown = sorted(set(allowed) - ours.keys())
        check(not unknown, f"checkpoint.allow: no such key: {', '.join(unknown)}")
        check(
            not differing,
            f"{self._at(step)} belongs to another run: {'; '.join(differing)}. "
            "Choose another name=..., or list keys that may change in checkpoint.allow",
        )

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState[Array], dict[str, Any]]:
        """The state, sharded over this run's mesh, and the position of its data iterator. shapes: Program.state.

        Raises ConfigError if the checkpoint cannot be read, or holds other arrays.
        """
        with translate_errors(f"{self._at(step)}: cannot be restored", (OSError, ValueError, KeyError)):
            restored = self._storage.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))
        return restored["state"], self._run(step)["position"]

    def save(self, state: TrainState[Array], position: dict[str, Any], data: dict[str, Any], probe: float | None = None) -> None:
        """Starts saving in the background; does nothing if the step is saved already. The state is copied before this returns.

        data: its fingerprint. probe: the state's loss on text that a resumed run can score again. Removes the checkpoints that
        neither checkpoint.keep nor keep_best keeps. A failure is logged, and does not end a run of one process: the next save may
        succeed, and wait() tells if none did. Of several processes it raises ConfigError, since the others do not know of it.
        """
        self._settle()
        step = int(state.step)
        if step in self._storage.steps():
            return
        run = {"config": flatten(self._config), "data": data, "position": position, "probe": probe}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        try:
            self._prune()
            self._failure = None
            self._storage.manager.save(step, args=args)
        except (OSError, ValueError) as error:
            self._failed(error)

    def poll(self) -> None:
        """Logs a background save that has failed, as save() does."""
        try:
            self._storage.manager.check_for_errors()
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
            self._storage.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failure = f"{self.name}: saving a checkpoint failed: {first_line(error)}; {_free(self._storage.directory)}"
        check(jax.process_count() == 1, self._failure)
        _log.warning("%s; the run goes on, and tries again when the next checkpoint is due", self._failure)
        self._storage.open()  # the one that failed counts the step as saved

    def _prune(self) -> None:
        """Removes all checkpoints but the latest and the best, as many as the config says."""
        c, steps = self._config.checkpoint, sorted(self._storage.steps())
        evaluated = sorted((step for step in steps if step in self._losses), key=self._losses.__getitem__)
        self._storage.remove(set(steps) - {*steps[-c.keep :], *evaluated[: c.keep_best]})

    def close(self) -> None:
        """Ends the background work. Call wait() first to surface pending errors."""
        self._storage.manager.close()

    def settings(self, step: int) -> dict[str, Any]:
        """The settings, by dotted key, of the run that saved a checkpoint."""
        return self._run(step)["config"]

    def probe(self, step: int) -> float | None:
        """The loss that was saved beside a state, to be compared with that of the restored one."""
        return self._run(step).get("probe")

    def faults(self) -> dict[int, str | None]:
        """What is wrong with each checkpoint, by step; None: it is intact. Reads all of their files."""
        return {step: self._storage.fault(step) for step in sorted(self._storage.steps())}

    def _run(self, step: int) -> dict[str, Any]:
        """What is saved beside the state: config, data fingerprint, position."""
        kinds = OSError, ValueError, KeyError, TypeError, AssertionError
        with translate_errors(f"{self._at(step)}: cannot be read", kinds):
            run = self._storage.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
            assert isinstance(run["config"], dict) and isinstance(run["data"], dict)
            assert isinstance(run["position"]["next_index"], int)
        return run

    def _at(self, step: int) -> str:
        """A checkpoint, for messages."""
        return f"{self.name}/{step}"


def _difference(key: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """How a setting differs, for a message; of a fingerprint, which is a hash, the settings that may be why."""
    if not key.startswith("fingerprint."):
        return f"{key} was {theirs.get(key)}, is {ours.get(key)}"
    names = sorted(name for name in ours.keys() | theirs.keys() if name.startswith("data.") and name not in WITHOUT_EFFECT)
    why = [_difference(name, theirs, ours) for name in names if theirs.get(name) != ours.get(name)]
    return f"{key} differs ({', '.join(why) or 'the same settings, but other contents of the files'})"


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
