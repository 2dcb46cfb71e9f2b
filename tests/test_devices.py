"""The table of peaks, products of bfloat16, memory, and profiler traces."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from mutransformer.sharding import devices
from mutransformer.sharding.devices import memory_in_use, multiplies_bfloat16, peak_flops


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


@pytest.mark.parametrize(
    ("platform", "kind", "multiplies"),
    [
        *(("tpu", kind, True) for kind in ("TPU v2", "TPU v5 lite", "TPU7x")),
        *(("gpu", kind, True) for kind in ("NVIDIA A100-SXM4-40GB", "NVIDIA H200", "NVIDIA L4", "AMD Instinct MI300X")),
        *(("gpu", kind, False) for kind in ("Tesla V100-SXM2-16GB", "Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "Quadro RTX 6000")),
    ],
)
def test_devices_that_multiply_bfloat16(platform: str, kind: str, multiplies: bool) -> None:
    assert multiplies_bfloat16(SimpleNamespace(platform=platform, device_kind=kind)) == multiplies


@pytest.mark.parametrize(
    ("text", "multiplies"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_tile amx_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t\t: avx512_bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),  # ARM
        ("", False),
        (None, False),  # no such file: macOS
    ],
)
def test_a_cpu_multiplies_bfloat16_by_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, multiplies: bool
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    flags = devices.cpu_flags(tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "cpu_flags", lambda: flags)
    assert multiplies_bfloat16(SimpleNamespace(platform="cpu", device_kind="cpu")) == multiplies


def test_a_real_device_is_understood():
    assert jax.devices()[0].platform == "cpu"
    assert peak_flops(jax.devices()[0].device_kind) is None
    assert memory_in_use(jax.local_devices()) is None


def test_memory_is_that_of_the_fullest_device():
    one, two = {"bytes_in_use": 5, "peak_bytes_in_use": 7}, {"bytes_in_use": 3, "peak_bytes_in_use": 9}
    assert memory_in_use([device(one), device(two)]) == {"bytes_in_use": 5, "peak_bytes": 9}
    assert memory_in_use([device(one), device(None)]) is None
