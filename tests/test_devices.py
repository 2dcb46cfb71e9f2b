"""The table of peaks, memory, and profiler traces."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mutransformer.config.run import ProfileConfig
from mutransformer.sharding.devices import Profile, memory_in_use, peak_flops


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


def test_profile_traces_the_window(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    profile = Profile(ProfileConfig(start=1, stop=3), tmp_path)
    double = jax.jit(lambda x: 2 * x)
    running = []
    for i in range(5):
        profile.step(i, wait_for=i)
        running.append(profile.running)
        double(jnp.ones(3))
    assert running == [False, True, True, False, False]
    assert waited == [1, 3]
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert len(list(tmp_path.glob("plugins/profile/*/*.trace.json.gz"))) == 1


def test_profile_resumed_within_the_window_and_cut_short(tmp_path):
    profile = Profile(ProfileConfig(start=1, stop=30), tmp_path)
    profile.step(7)
    assert profile.running
    profile.close(jnp.ones(3))
    profile.close()
    assert not profile.running
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("process", [0, 1])
def test_no_profile_unless_asked_for_on_process_0(tmp_path, monkeypatch, process):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    profile = Profile(ProfileConfig() if process == 0 else ProfileConfig(start=0, stop=9), tmp_path)
    for i in range(3):
        profile.step(i)
    profile.close()
    assert not list(tmp_path.iterdir())
