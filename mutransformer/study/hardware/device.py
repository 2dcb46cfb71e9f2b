"""What a report runs on: devices, versions, and the settings of the environment that change what XLA does."""

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from mutransformer.errors import redact
from mutransformer.study.hardware.section import Result, Task, without_folders

PACKAGES = ("mutransformer", "jax", "jaxlib", "equinox", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
PACKAGES += ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-nccl-cu13", "nvidia-nccl-cu12")
ENVIRONMENT = re.compile(r"XLA_\w+|LIBTPU_INIT_ARGS|JAX_\w+|NCCL_\w+|CUDA_VISIBLE_DEVICES")
CPU_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "avx")  # the widest first
BUSY = 0.3  # of the cores: a load average above it means that others computed, too


def describe(task: Task) -> Iterator[Result]:
    """The devices that JAX sees, the versions of what computes, and the environment. No name of a host, no path."""
    import jax

    from mutransformer.sharding.devices import cpu_flags, memory_limit, multiplies_bfloat16, peak_flops

    devices = jax.devices()
    first, local = devices[0], jax.local_devices()
    memory = (first.memory_stats() or {}).get("bytes_limit")
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    widest = next((flag for flag in CPU_FLAGS if flag in cpu_flags()), "")
    yield {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": len(devices),
        "memory_bytes": memory or memory_limit(local[0], len(local)),
        "peak_flops": peak_flops(first.device_kind),
        "compute": "bfloat16" if multiplies_bfloat16(first) else "float32",
        "cpu": {"cores": cores, "widest_instructions": widest, "machine": platform.machine(), "load_average": load},
        "python": platform.python_version(),
        "system": platform.uname().system,  # no other of its fields: one names the host
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "environment": environment(os.environ),
        "name": name_of(first.platform, first.device_kind, len(devices), cores, widest, jax.__version__),
    }


def environment(variables: Any) -> dict[str, str]:
    """The variables that change what XLA and JAX do, without folders and secrets. Addresses are left out."""
    chosen = {name: variables[name] for name in sorted(variables) if ENVIRONMENT.fullmatch(name)}
    return {name: without_folders(redact(text)) for name, text in chosen.items() if not re.search("ADDRESS|_DIR$", name)}


def name_of(platform: str, kind: str, count: int, cores: int, instructions: str, version: str) -> str:
    """The name of a report's folder: cpu-2-core-avx2-jax-0.10.2, or nvidia-h100-80gb-hbm3-jax-0.11.2, with 8x- before several."""
    device = f"cpu {cores} core {instructions}" if platform == "cpu" else (f"{count}x " if count > 1 else "") + kind
    return re.sub(r"[^a-z0-9.]+", "-", f"{device} jax {version}".lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
