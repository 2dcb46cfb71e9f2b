"""Profiler traces of a window of steps."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from short_runs import settings

from mutransformer.config.load import load
from mutransformer.config.run import ProfileConfig
from mutransformer.errors import FINISHED
from mutransformer.training.loop import train
from mutransformer.training.profile import Profile
from mutransformer.training.program import build_with_data


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


def test_a_run_names_its_steps_in_the_trace(tmp_path: Path) -> None:
    """Tools that report by step find them: XLA's own events have no number."""
    steps = ["profile.start=1", "profile.stop=3", "steps=4"]
    assert train(*build_with_data(load([*settings(tmp_path), *steps]))) == FINISHED
    (path,) = tmp_path.glob("**/plugins/profile/*/*.trace.json.gz")
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train") == [2, 3]


@pytest.mark.parametrize("process", [0, 1])
def test_no_profile_unless_asked_for_on_process_0(tmp_path, monkeypatch, process):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    profile = Profile(ProfileConfig() if process == 0 else ProfileConfig(start=0, stop=9), tmp_path)
    for i in range(3):
        profile.step(i)
    profile.close()
    assert not list(tmp_path.iterdir())
