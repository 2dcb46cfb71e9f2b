"""The table of peaks, memory, and profiler traces."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from mutransformer.sharding.devices import memory_in_use, peak_flops


def device(stats: Any) -> Any:
    return SimpleNamespace(memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_peak_of_known_kinds(kind, tera):
    assert peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "TPU v4 lite",
        "TPU v9",
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "",
    ],
)
def test_no_peak_is_guessed(kind):
    assert peak_flops(kind) is None


def test_a_real_device_is_understood():
    assert jax.devices()[0].platform == "cpu"
    assert peak_flops(jax.devices()[0].device_kind) is None
    assert memory_in_use(jax.local_devices()) is None


def test_memory_is_that_of_the_fullest_device():
    one, two = {"bytes_in_use": 5, "peak_bytes_in_use": 7}, {"bytes_in_use": 3, "peak_bytes_in_use": 9}
    assert memory_in_use([device(one), device(two)]) == {"bytes_in_use": 5, "peak_bytes": 9}
    assert memory_in_use([device(one), device(None)]) is None
