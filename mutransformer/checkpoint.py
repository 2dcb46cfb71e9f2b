"""What a run saves and goes on from: {state, data position, resolved config} as one Orbax checkpoint, or none of it."""

import logging
from typing import Any

import orbax.checkpoint as ocp
from jax import Array
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mutransformer.config import Config, ConfigError, check, flatten
from mutransformer.state import TrainState

# May differ between a checkpoint and the run that goes on from it: they change neither the weights' meaning nor the data.
FREE = {
    "name",
    "workdir",
    "data.cache_dir",
    "data.threads",
    "data.prefetch",
    "model.remat",
    "optim.accumulate",
    *(f"{section}." for section in ("mesh", "distributed", "eval", "log", "checkpoint", "profile")),
}
ITEMS = ("state", "run")  # the folders in a checkpoint

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, in its folder. Saving goes on in the background; close() or wait() before leaving."""

    def __init__(self, config: Config, *, read_only: bool = False):
        """Args:
            read_only: nothing is created or tidied up.

        Raises:
            ConfigError: the folder cannot be made or read.
        """
        self._config = config
        self.directory = (config.rundir / "checkpoints").absolute()
        keep: list[Any] = [LatestN(config.checkpoint.keep)]
        if config.checkpoint.keep_best:
            by_loss = BestN(
                get_metric_fn=lambda metrics: metrics["loss"],
                reverse=True,
                n=config.checkpoint.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            keep.append(by_loss)
        check(not read_only or self.directory.is_dir(), f"{self.directory}: no checkpoints here")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(keep),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.directory}: cannot be used for checkpoints: {_first_line(error)}") from None

    def latest(self) -> int | None:
        """The newest complete checkpoint, by updates completed; None if there never was one.

        Raises:
            ConfigError: there are checkpoints, and all lack parts.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            missing = [item for item in ITEMS if not (self.directory / str(step) / item).is_dir()]
            if not missing:
                return step
            _log.warning("%s: incomplete, lacks %s; trying the one before", self.directory / str(step), ", ".join(missing))
        check(not steps, f"{self.directory}: every checkpoint here is incomplete; move the folder away to start from scratch")
        return None

    def best(self) -> int | None:
        """The checkpoint with the lowest validation loss, if any was evaluated."""
        losses = {step: (self._manager.metrics(step) or {}).get("loss") for step in self._manager.all_steps()}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=known.__getitem__) if known else None

    def check_same(self, step: int, data: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model, optimizer or data.

        Args:
            step: of the checkpoint.
            data: the fingerprint of this run's data.

        Raises:
            ConfigError: lists the settings that differ, theirs and ours.
        """
        saved = self._run(step)
        config = self._config
        ours = flatten(config) | {f"fingerprint of {key}": value for key, value in data.items()}
        theirs = saved["config"] | {f"fingerprint of {key}": value for key, value in saved["data"].items()}
        differing = [
            f"{key} was {theirs.get(key)}, is {ours.get(key)}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and not _is_free(key) and key not in config.checkpoint.allow
        ]
        check(
            not differing,
            f"{self.directory / str(step)} belongs to another run: {'; '.join(differing)}. "
            "Choose another name=..., or list keys that may change in checkpoint.allow",
        )

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState[Array], dict[str, Any]]:
        """The state, laid on this run's mesh, and the position of its data iterator.

        Args:
            step: of the checkpoint.
            shapes: what is expected, with shardings; a plan's shapes.

        Raises:
            ConfigError: it cannot be read, or holds other arrays.
        """
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{self.directory / str(step)}: cannot be restored: {_first_line(error)}") from None
        return restored["state"], self._run(step)["position"]

    def save(self, state: TrainState[Array], position: dict[str, Any], data: dict[str, Any], loss: float | None) -> None:
        """Starts to save; a step that is there already is left alone.

        Args:
            state: of the run; copied before this returns.
            position: of the data iterator.
            data: the fingerprint of the data.
            loss: on validation, if known at this step; decides which checkpoints are the best.

        Raises:
            ConfigError: this save or the one before failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        run = {"config": flatten(self._config), "data": data, "position": position}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self._guard(lambda: self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss}))

    def poll(self) -> None:
        """Raises ConfigError if a save in the background has failed."""
        self._guard(self._manager.check_for_errors)

    def stop_requested(self, step: int) -> bool:
        """Whether the scheduler of a multi-process job has sent SIGTERM; all processes agree on the step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when all is on disk. Raises ConfigError if saving failed."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Ends the background work; wait() first to hear of its errors."""
        self._manager.close()

    def _run(self, step: int) -> dict[str, Any]:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{self.directory / str(step)}: cannot be read: {_first_line(error)}") from None

    def _guard(self, action: Any) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.directory}: saving a checkpoint failed: {_first_line(error)}") from None


def _is_free(key: str) -> bool:
    return key in FREE or key.partition(".")[0] + "." in FREE


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
