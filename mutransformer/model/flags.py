"""What XLA is told when it compiles a step, by kind of device: data, found with scripts/plan.py on simulated steps.

The options belong to the compilation of the step alone. They are given with it, not through XLA_FLAGS or LIBTPU_INIT_ARGS, where
a flag of another device's compiler ends the process.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from mutransformer.config.schema import Config


class Tuning(NamedTuple):
    """Attributes:
    options: for XLA, by name.
    exchange: whether sums over y go by an all-to-all (collectives.scatter_y).
    """

    options: Mapping[str, str]
    exchange: bool


# Weights are gathered while matrix products run; an all-gather is not made an all-reduce of padded shards, which cannot.
_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
_EXCHANGES = {"xla_tpu_enable_async_all_to_all": "true"}  # which run beside computation

# Vector memory that a fusion may take, in KiB: larger tiles of matrix products. A core has 64 MiB on v5p; 16 are the default.
_TUNING = {
    r"TPU v5p?": Tuning({**_GATHERS, **_EXCHANGES, "xla_tpu_scoped_vmem_limit_kib": "57344"}, exchange=True),
    r"TPU v4": Tuning({**_GATHERS, **_EXCHANGES}, exchange=True),
    # Chips whose slices are no tori: "Async all-to-all not supported on limited ICI".
    r"TPU v5( ?lite|e)": Tuning({**_GATHERS, "xla_tpu_scoped_vmem_limit_kib": "57344"}, exchange=False),
    r"TPU v6( ?lite|e)": Tuning(_GATHERS, exchange=False),
}
_NONE = Tuning({}, exchange=False)


def tuning(device_kind: str) -> Tuning:
    """What is set for a kind of device, as JAX names it; nothing if it is not known, as for a CPU."""
    return next((t for pattern, t in _TUNING.items() if re.fullmatch(pattern, device_kind, re.IGNORECASE)), _NONE)


def compiler_options(config: Config, device_kind: str) -> dict[str, str]:
    """The options with which a run's step is compiled for a kind of device."""
    return {**(tuning(device_kind).options if config.xla_tuned else {}), **config.xla}
