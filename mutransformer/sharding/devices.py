"""Devices: peak FLOP/s by kind, products of bfloat16, memory in use, memory limits.

A kind that is not in the table of peaks has none: a wrong peak would make every MFU wrong.
"""

import ctypes
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax

# glibc's names for mallopt's parameters.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


# Dense bfloat16 FLOP/s with float32 accumulation, from the vendors' data sheets; where a sheet gives the number with sparsity,
# half of it. Per device as JAX counts them: a TPU v2, v3 or 7x chip is two devices. A pattern must match the full kind, so that
# a variant with other clocks (a laptop GPU, a PCIe card, part of a partitioned GPU) is unknown unless it has its own line.
_PEAK_FLOPS: dict[str, float] = {
    r"TPU v2": 45e12 / 2,
    r"TPU v3": 123e12 / 2,
    r"TPU v4": 275e12,
    r"TPU v5( ?lite|e)": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6( ?lite|e)": 918e12,
    r"TPU ?(v7|7)x": 2307e12 / 2,
    r"A100-(SXM4?|PCIE)-[48]0GB|A100 80GB PCIe": 312e12,
    r"A30": 165e12,
    r"A10": 125e12,
    r"L4": 121e12,
    r"L40": 181e12,
    r"L40S": 362e12,
    r"H100( SXM5)?( 80GB HBM3)?|GH200( \d+GB)?": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL|H200 NVL": 835e12,
    r"H200( 141GB HBM3e)?": 989e12,
    r"B200": 2250e12,
    r"GB200": 2500e12,
    r"GeForce RTX 3090": 71e12,
    r"GeForce RTX 4090": 165e12,
}


# NVIDIA GPUs from before Ampere, which multiply no bfloat16 and have no attention kernel of cuDNN.
BEFORE_AMPERE = r"[VPK]\d+\b|\bT4\b|GTX|TITAN|RTX 20|Quadro"
_CPU_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # Linux's names for x86's instructions that multiply it


def multiplies_bfloat16(device: Any) -> bool:
    """Whether a device, or an abstract device, has instructions that multiply bfloat16, which is then faster than float32.

    A CPU without them converts every factor, and a step of configs/small.yaml takes 1.3 times as long. CPUs other than x86 count
    as such, since XLA's products were measured on none.
    """
    if device.platform == "cpu":
        return bool(_CPU_BFLOAT16 & cpu_flags())
    return device.platform == "tpu" or not re.search(BEFORE_AMPERE, device.device_kind, re.IGNORECASE)


@cache
def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets of this machine's CPU by Linux's names; none elsewhere."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def quick_compilation(platform: str) -> dict[str, str]:
    """XLA's options, by name, that compile a program sooner for devices of a platform, as JAX names it.

    On a CPU LLVM optimizes less, at level 1 instead of 3: a train step compiles in 60 to 80 % of the time, and is as fast. A
    level in XLA_FLAGS is left alone, over which these options would take precedence.
    """
    option = "xla_backend_optimization_level"
    return {option: "1"} if platform == "cpu" and option not in os.environ.get("XLA_FLAGS", "") else {}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device of a kind as JAX names it, dense; None if the kind is not known, as for a CPU."""
    kind = device_kind.strip().removeprefix("NVIDIA ")
    return next((flops for pattern, flops in _PEAK_FLOPS.items() if re.fullmatch(pattern, kind, re.IGNORECASE)), None)


def memory_in_use(devices: Sequence[Any]) -> dict[str, int] | None:
    """Memory in bytes of the fullest of these devices, which are of this process; None if one reports none, as a CPU.

    Returns {"bytes_in_use": now, "peak_bytes": maximum since the start}.
    """
    stats = [device.memory_stats() for device in devices]
    if not all(stats):
        return None
    return {"bytes_in_use": max(s["bytes_in_use"] for s in stats), "peak_bytes": max(s["peak_bytes_in_use"] for s in stats)}


def memory_limit(device: Any, n: int) -> int:
    """Bytes that a program may use on a local device, one of n of this process; simulated ones share the host's memory."""
    stats = device.memory_stats() or {}
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    return stats.get("bytes_limit") or int(0.8 * physical / n)


def keep_freed_memory() -> None:
    """On a CPU with glibc: makes malloc keep freed memory instead of returning it to the system.

    XLA allocates its temporaries in every step. By default glibc returns blocks of that size to the system at once; the page
    faults of getting them back took up to a third of a small model's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and jax.default_backend() == "cpu":
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 << 20)):
            mallopt(parameter, value)
