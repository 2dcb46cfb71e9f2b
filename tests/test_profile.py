"""Profiler traces of a window of steps."""

import jax
import jax.numpy as jnp
import pytest

from mutransformer.config.run import ProfileConfig
from mutransformer.training.loop import Profile


def test_profile_traces_the_window(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    steps: list[int] = []
    profile = Profile(ProfileConfig(start=1, stop=3), tmp_path, wait_for=lambda: steps[-1])
    double = jax.jit(lambda x: 2 * x)
    running = []
    for i in range(5):
        steps.append(i)
        profile.step(i)
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
    profile.close()
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
