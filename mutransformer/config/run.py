"""How a run is run: devices, processes, evaluation, logs, checkpoints, profiler traces. Part of config.py's tree."""

from dataclasses import dataclass, field
from typing import Literal, Optional

from mutransformer.errors import check


@dataclass(frozen=True)
class MeshConfig:
    """Devices as an x by y grid: x holds rows of the batch and shards of weights, y holds features. Several such grids, TPU
    slices or whatever a slower network joins, hold copies of the weights and rows of their own."""

    x: int = -1  # -1: all devices that y leaves
    y: int = 1
    replicas: int = 1  # grids; gradients are summed over them once a step
    # A device's rows are worked off in so many independent parts, so that one computes while another waits for y.
    overlap_groups: Optional[int] = None  # None: 2 where y > 1 and model.remat is not none, else 1
    reduce_scatter_via_all_to_all: Optional[bool] = (
        None  # sums over y by an all-to-all instead of a reduce-scatter; None: where faster, see flags.py
    )

    def __post_init__(self) -> None:
        check(self.x >= 1 or self.x == -1, f"mesh.x = {self.x}: must be at least 1, or -1 for all devices")
        for key in ("y", "replicas"):
            check(getattr(self, key) >= 1, f"mesh.{key} = {getattr(self, key)}: must be at least 1")
        check(
            self.overlap_groups is None or self.overlap_groups >= 1,
            f"mesh.overlap_groups = {self.overlap_groups}: must be at least 1",
        )


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run (jax.distributed): the same command on each host."""

    enabled: Optional[bool] = None  # None: if a coordinator is given here or in JAX_COORDINATOR_ADDRESS; on a pod or SLURM: true
    coordinator: Optional[str] = None  # host:port of process 0; None: found by JAX from the cluster's environment
    n_process: Optional[int] = None
    process_id: Optional[int] = None
    timeout: int = 300  # seconds to wait for the other processes at the start

    def __post_init__(self) -> None:
        host, _, port = (self.coordinator or "localhost:0").rpartition(":")
        check(bool(host) and port.isdecimal(), f"distributed.coordinator = {self.coordinator}: must be host:port")
        check(self.timeout >= 1, f"distributed.timeout = {self.timeout}: must be at least 1")
        check(
            self.process_id is None or self.process_id >= 0,
            f"distributed.process_id = {self.process_id}: must not be negative",
        )
        if self.n_process is not None:
            check(self.n_process >= 1, f"distributed.n_process = {self.n_process}: must be at least 1")
            check(
                self.process_id is None or self.process_id < self.n_process,
                f"distributed.process_id = {self.process_id}: must lie in 0 ... {self.n_process - 1}",
            )


@dataclass(frozen=True)
class EvalConfig:
    every: int = 200  # steps between evaluations; 0: only at the end
    batches: int = 16  # of data.batch_size rows, always the same ones
    final_batches: Optional[int] = None  # at the end of the run; None: the whole validation split
    split: Literal["validation", "test"] = "validation"  # for scripts/evaluate.py, which scores all of it
    checkpoint: Literal["newest", "best"] = "newest"  # for scripts/evaluate.py and generate.py

    def __post_init__(self) -> None:
        check(self.every >= 0, f"eval.every = {self.every}: must not be negative")
        check(self.batches >= 1, f"eval.batches = {self.batches}: must be at least 1")
        check(
            self.final_batches is None or self.final_batches >= 1,
            f"eval.final_batches = {self.final_batches}: must be at least 1",
        )


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between lines of numbers
    tensorboard: bool = True
    wandb: Optional[str] = None  # a Weights & Biases project: logs there too

    def __post_init__(self) -> None:
        check(self.every >= 1, f"log.every = {self.every}: must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 200  # steps between checkpoints; 0: only at the end and when stopped
    keep: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints kept for their validation loss
    resume: bool = True  # go on from the newest checkpoint in the run's folder; false: the folder must hold none
    allow: list[str] = field(default_factory=list)  # keys that may differ from those of the checkpoint, e.g. [steps]

    def __post_init__(self) -> None:
        check(self.every >= 0, f"checkpoint.every = {self.every}: must not be negative")
        check(self.keep >= 1, f"checkpoint.keep = {self.keep}: must be at least 1")
        check(self.keep_best >= 0, f"checkpoint.keep_best = {self.keep_best}: must not be negative")


@dataclass(frozen=True)
class ProfileConfig:
    """A profiler window: steps start ... stop - 1 are traced, for TensorBoard or Perfetto."""

    start: int = 0
    stop: int = 0  # 0: no trace

    def __post_init__(self) -> None:
        check(0 <= self.start, f"profile.start = {self.start}: must not be negative")
        check(
            self.stop == 0 or self.stop > self.start,
            f"profile.stop = {self.stop}: must be above profile.start = {self.start}, or 0 for no trace",
        )
