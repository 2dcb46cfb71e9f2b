"""What a sweep writes while runs are under way: curves for TensorBoard, and snapshots to go on from."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Float
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from mutransformer.config.schema import flatten
from mutransformer.study.sweep.grid import Job
from mutransformer.study.sweep.records import Run

Point = tuple[float, int]  # (base learning rate, seed)


class Board:
    """TensorBoard: a run's curve and, once it has ended, its settings and results. Only process 0 writes."""

    def __init__(self, folder: Path, job: Job, points: Sequence[Point], step: int):
        """Args:
        folder: of the sweep.
        job, points: whose curves.
        step: updates completed already.
        """
        self._settings = {k: v for k, v in flatten(job.config).items() if isinstance(v, bool | int | float | str)}
        self._writers: list[SummaryWriter] = []
        if jax.process_index() == 0 and job.config.log.tensorboard:
            for lr, seed in points:
                name = f"{job.variant} width={job.width} lr={lr:.6g} seed={seed}".replace("/", "_")
                log = str(folder / "tensorboard" / name)
                self._writers.append(SummaryWriter(log, purge_step=step + 1, filename_suffix=f".{step}", flush_secs=30))

    def write(self, step: int, losses: Float[np.ndarray, "n R"]) -> None:
        """The mean losses of the steps up to `step`."""
        for writer, loss in zip(self._writers, losses.mean(axis=0), strict=False):
            writer.add_scalar("train/loss", float(loss), step)

    def finish(self, runs: Sequence[Run]) -> None:
        """The end of each run, for the table that compares runs. A diverged run has no loss in it."""
        for writer, run in zip(self._writers, runs, strict=False):
            if run.validation_loss is not None:
                writer.add_scalar("validation/loss", run.validation_loss, run.steps)
                settings = self._settings | {"variant": run.variant, "optim.lr": run.lr, "seed": run.seed}
                for summary in hparams(settings, {"validation/loss": run.validation_loss}):
                    writer._get_file_writer().add_summary(summary)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class Snapshots:
    """The newest state of runs under way, by what identifies them. Orbax makes each appear whole or not at all."""

    def __init__(self, folder: Path, identity: Any):
        """Args:
        folder: of the sweep.
        identity: plain data; another one finds none of these snapshots.
        """
        name = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._folder = (folder / "snapshots" / name).absolute()
        self._checkpointer = ocp.StandardCheckpointer()

    def newest(self) -> Optional[int]:
        """Its step, if there is one."""
        steps = [int(path.name) for path in self._folder.glob("*") if path.name.isdecimal()]
        return max(steps, default=None)

    def restore(self, step: int, shapes: Any) -> Any:
        """What was saved at a step. shapes: what is expected, with shardings."""
        return self._checkpointer.restore(self._folder / str(step), shapes)

    def save(self, step: int, tree: Any) -> None:
        """Returns when it is on disk, and the one before is gone."""
        before = self.newest()
        self._checkpointer.save(self._folder / str(step), tree, force=True)
        self._checkpointer.wait_until_finished()
        if before not in (None, step) and jax.process_index() == 0:
            shutil.rmtree(self._folder / str(before))

    def drop(self) -> None:
        """Removes them: the runs have ended."""
        self._checkpointer.close()
        if jax.process_index() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
