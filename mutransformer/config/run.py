"""Settings of how a run executes: devices, processes, evaluation, logs, checkpoints and profiler traces."""

import re
from dataclasses import dataclass
from typing import Literal, Optional

from mutransformer.config.data import FilesConfig
from mutransformer.config.setting import check_settings, setting
from mutransformer.errors import check


@dataclass(frozen=True)
class MeshConfig:
    """Devices as x by y grids."""

    x: int = setting(-1, "devices along x, which holds rows of the batch and shards of the weights; -1: all that y leaves")
    y: int = setting(1, "devices along y, which holds features", min=1)
    replicas: int = setting(
        1,
        "x by y grids, e.g. TPU slices that a slower network joins; each holds a copy of the weights and rows of its own, and "
        "gradients are summed over them once per step",
        min=1,
    )
    overlap_groups: Optional[int] = setting(
        None,
        "a device's rows are split into this many groups; one computes while another communicates over y. "
        "null: 2 if y > 1 and model.remat is not none, else 1",
        min=1,
    )
    reduce_scatter_via_all_to_all: Optional[bool] = setting(
        None, "sum over y by an all-to-all instead of a reduce-scatter; null: where that is faster"
    )

    def __post_init__(self) -> None:
        check(self.x >= 1 or self.x == -1, f"mesh.x = {self.x}: must be at least 1, or -1 for all devices")
        check_settings(self, "mesh.")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run (jax.distributed): the same command on each host."""

    enabled: Optional[bool] = setting(
        None, "null: if coordinator or JAX_COORDINATOR_ADDRESS is set; true on a TPU pod or SLURM, where JAX finds the processes"
    )
    coordinator: Optional[str] = setting(None, "host:port of process 0; null: JAX finds it in the cluster's environment")
    n_process: Optional[int] = setting(None, "number of processes; null: from the cluster's environment", min=1)
    process_id: Optional[int] = setting(None, "index of this process; null: from the cluster's environment", min=0)
    timeout: int = setting(300, "seconds to wait for the other processes at the start", min=1)

    def __post_init__(self) -> None:
        check_settings(self, "distributed.")
        host, _, port = (self.coordinator or "localhost:0").rpartition(":")
        check(bool(host) and port.isdecimal(), f"distributed.coordinator = {self.coordinator}: must be host:port")
        n, i = self.n_process, self.process_id
        below = n is None or i is None or i < n
        check(below, f"distributed.process_id = {i}: must be below distributed.n_process = {n}")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text."""

    every: int = setting(200, "steps between evaluations; 0: only at the end", min=0)
    batches: int = setting(16, "validation batches of data.batch_size rows, the same ones every time", min=1)
    final_batches: Optional[int] = setting(None, "batches at the end of the run; null: the whole validation split", min=1)
    split: Literal["validation", "test"] = setting("validation", "for `evaluate`, which scores the whole split")
    samples: int = setting(2, "texts sampled at each evaluation; they continue held-out documents; 0: none", min=0)
    prompts: list[str] = setting(list, "texts to continue instead, one sample of each")
    sets: dict[str, FilesConfig] = setting(dict, "further texts by name, for `evaluate`, which scores each as a whole")
    checkpoint: Literal["latest", "best"] = setting("latest", "for `evaluate` and `generate`; best: by validation loss")

    def __post_init__(self) -> None:
        check_settings(self, "eval.")
        for name, files in self.sets.items():
            valid = re.fullmatch(r"[\w-]+", name) is not None
            check(valid, f"eval.sets.{name}: a text's name must consist of letters, digits, _ and -")
            check(name not in ("validation", "test"), f"eval.sets.{name}: the name of a split of the data; choose another")
            files.check(f"eval.sets.{name}")


@dataclass(frozen=True)
class LogConfig:
    """Metrics."""

    every: int = setting(10, "steps between logged metrics", min=1)
    layers: int = setting(
        0, "steps between sizes of activations, gradients, weights and updates of each layer; 0: none, at no cost", min=0
    )
    tensorboard: bool = setting(True, "write TensorBoard events")
    wandb: Optional[str] = setting(None, "a Weights & Biases project to log to as well")

    def __post_init__(self) -> None:
        check_settings(self, "log.")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, and what a resumed run may change."""

    every: int = setting(200, "steps between checkpoints; 0: only at the end and when stopped", min=0)
    keep: int = setting(2, "latest checkpoints kept", min=1)
    keep_best: int = setting(1, "checkpoints kept for their validation loss", min=0)
    resume: bool = setting(True, "resume from the latest checkpoint in the run's folder; false: the folder must hold none")
    allow: list[str] = setting(list, "keys that may differ from the checkpoint's, e.g. [steps]")

    def __post_init__(self) -> None:
        check_settings(self, "checkpoint.")


@dataclass(frozen=True)
class BadStepsConfig:
    """Steps that are skipped: weights and moments stay as they are if the loss or the gradient is not finite, or a spike."""

    limit: int = setting(10, "skipped steps in a row that end the run; 1: the first one does", min=1, resume="free")
    spike: float = setting(
        0.0,
        "also skip a step whose loss or gradient norm is so many standard deviations above the mean of the latest 128; 0: none",
        min=0,
    )

    def __post_init__(self) -> None:
        check_settings(self, "bad_steps.")


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run that makes no progress is ended, with exit code 76, so that it can be started again."""

    timeout: Optional[float] = setting(
        None,
        "seconds that a step or a batch of an evaluation may take; 0: any; null: 20 times the longest step, at least 300",
        min=0,
    )
    start_timeout: float = setting(3600.0, "seconds until two steps are completed, compilation included; and of a save", min=0)
    peer_timeout: float = setting(20.0, "seconds without a sign of another process after which it is gone", min=1)

    def __post_init__(self) -> None:
        check_settings(self, "watchdog.")


@dataclass(frozen=True)
class ProfileConfig:
    """A profiler trace of some steps, for TensorBoard or Perfetto."""

    start: int = setting(0, "first step traced", min=0)
    stop: int = setting(0, "the step after the last one traced; 0: no trace", min=0)

    def __post_init__(self) -> None:
        check_settings(self, "profile.")
        message = f"profile.stop = {self.stop}: must be above profile.start = {self.start}, or 0 for no trace"
        check(self.stop == 0 or self.stop > self.start, message)
