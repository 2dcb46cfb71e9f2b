"""The planner end to end: scripts/plan.py, the Python API, and the TPU compiler where it is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.config.run import MeshConfig
from mutransformer.errors import ConfigError
from mutransformer.planning import timeline
from mutransformer.planning.compiled.compilers import CompiledStep, compile_step, require_compiler, topology_devices
from mutransformer.planning.compiled.replay import Schedule, Span
from mutransformer.planning.compiled.simulate import simulate
from mutransformer.planning.estimate.bounds import estimate, make_scenario, with_mesh
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.machines import parse_topology
from mutransformer.planning.plan import Plan, plan
from mutransformer.sharding.mesh import make_mesh

ROOT = Path(__file__).parent.parent
SMALL = ["model.d_model=128", "model.d_head=64", "model.n_layer=3", "model.n_vocab=512", "data.seq_len=64", "data.batch_size=8"]
HLO = (ROOT / "tests" / "data" / "hlo" / "step_v5e_4x2.hlo").read_text()
HLO_MODEL = ["model.d_model=256", "model.d_head=128", "model.n_layer=6", "model.n_vocab=1024", "model.remat=full"]


@pytest.fixture
def run_script(capsys, monkeypatch):
    monkeypatch.setattr("mutransformer.planning.plan.remat_policies", lambda: ("none", "full"))

    def run(*args: str) -> tuple[int, str, str]:
        code = main(["plan", *SMALL, *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_json_is_all_that_goes_to_standard_output(run_script):
    code, out, _ = run_script("--topology", "v5e:2x2", "--mesh", "x=2,y=2", "--json")
    data = json.loads(out)
    assert code == 0 and data["topology"] == "v5e:2x2" and data["mesh"] == {"x": 2, "y": 2}
    found = data["estimate"]
    assert found["step_seconds_at_least"] == max(found["bounds"].values()) == found["bounds"][found["bound"]]
    assert found["peak_bytes"] == sum(found["memory"].values()) and found["by_remat"].keys() >= {"none", "full"}


def test_tables_fit_in_a_hundred_columns(run_script):
    code, out, _ = run_script("--topology", "v5e:2x2", "--mesh", "x=2,y=2")
    assert code == 0 and max(map(len, out.splitlines())) <= 100
    for what in ("memory per chip", "bounds the step", "all-gather", "by model.remat", "chip-hours", "Lower bounds"):
        assert what in out
    assert str(plan(load(SMALL), "v5e:2x2", mesh="x=2,y=2")) == out  # the Python API shows the same


def test_a_search_is_a_table(run_script):
    code, out, _ = run_script("--topology", "v5e:1x1", "--search", "--top", "1")
    assert code == 0 and "fastest first" in out and out.count("x=1 y=1") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("--topology", "cpu"),
        ("--topology", "v5p:5x5x5"),
        ("--mesh", "q=2"),
        ("--topology", "v5p-128"),
        ("--top", "0"),
        ("--timeline", "a.png"),
        ("--search", "--mesh", "x=1"),
        ("--kernel-flops", "splash"),
        ("--kernel-flops", "(=1"),
        ("--kernel-efficiency", "2"),
        ("--topology", "v5e:1x1", "model.n_layr=2"),
    ],
)
def test_a_mistake_is_one_line(run_script, args):
    code, out, err = run_script(*args)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1


def test_a_missing_compiler_is_a_one_line_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        require_compiler(parse_topology("v5e:1x1"))


@pytest.fixture(scope="module")
def simulated():
    config = load([*HLO_MODEL, "data.seq_len=64", "data.batch_size=16"])
    found = estimate(make_scenario(with_mesh(config, "x=4,y=2"), parse_topology("v5e:2x4")), KernelFlops())
    memory = {"arguments": 8e6, "outputs": 4e3, "temporaries": 4e6, "code": 5e6}
    return Plan(found, {}, simulate(found.scenario, CompiledStep(HLO, 1.0, memory), KernelFlops()))


def test_a_compiled_step_as_json_and_tables(simulated):
    data = simulated.as_json()["compiled"]
    assert data["peak_bytes"] == 8e6 + 4e3 + 4e6 and data["fits"]
    assert sum(size for what, size in data["memory"].items() if what != "code") == pytest.approx(data["peak_bytes"])
    hybrid = data["costings"]["hybrid"]
    assert hybrid["step_seconds"] == data["step_seconds"] < data["costings"]["cycles"]["step_seconds"]
    # 6 for each of the 6 x 12 x 256^2 + 2 x 256 x 1024 weights, without the embedding in our convention; and 12 L T d.
    weights, ends, attention = 6 * 12 * 256**2, 2 * 256 * 1024, 12 * 6 * 64 * 256
    assert data["model_flops"]["mfu_6n"] == (6 * (weights + ends) + attention) * 1024
    assert data["model_flops"]["mfu"] == (6 * (weights + ends / 2) + attention) * 1024
    assert hybrid["mfu"] == pytest.approx(data["model_flops"]["mfu"] / 8 / 197e12 / hybrid["step_seconds"])
    assert hybrid["exposed_seconds"] == pytest.approx(sum(each["exposed_seconds"] for each in hybrid["collectives"]))
    json.dumps(data)
    assert "simulated step" in str(simulated) and max(map(len, str(simulated).splitlines())) <= 100


def test_timeline_writes_a_png(simulated, tmp_path):
    pytest.importorskip("matplotlib")
    timeline.draw(simulated.simulated, "step", tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no such format"):
        timeline.draw(simulated.simulated, "step", tmp_path / "step.txt")


def test_timeline_shows_every_round_of_loops(simulated):
    schedule = simulated.simulated.schedules["hybrid"]
    drawn = list(timeline.bars(schedule))
    busy = sum(bar.seconds for bar in drawn if bar.row == "core")
    assert busy == pytest.approx(schedule.seconds)
    assert max(bar.start + bar.seconds for bar in drawn if bar.row == "core") == pytest.approx(schedule.seconds)
    assert [loop.n for loop in timeline.most_expensive_loops(schedule, 2)] == [6, 6]


def test_timeline_merges_adjacent_bars():
    spans = [Span("core", "matmul", 0.0, 1.0, ""), Span("core", "matmul", 1.0, 1.0, ""), Span("core", "other", 2.0, 1.0, "")]
    drawn = timeline.merge(list(timeline.bars(Schedule(4.0, [*spans, Span("core", "matmul", 3.5, 0.5, "")]))), 4.0)
    assert [(bar.kind, bar.start, bar.seconds) for bar in drawn] == [("matmul", 0, 2), ("other", 2, 1), ("matmul", 3.5, 0.5)]


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install .[tpu]")


@needs_compiler
def test_a_compiled_step_moves_what_the_estimate_counts():
    """A step small enough to compile in seconds."""
    config = load([*SMALL, "model.n_layer=1", "model.remat=full"])
    found = estimate(make_scenario(with_mesh(config, "x=2,y=2"), parse_topology("v5e:2x2")), KernelFlops())
    real = simulate(found.scenario, compile_step(found.scenario), KernelFlops())
    assert found.seconds < real.seconds < 1e-3 and not real.totals["hybrid"].warnings
    gathers = {each.axes: each.bytes for each in found.traffic if each.kind == "all-gather"}
    compiled = sum(
        sums.bytes for key, sums in real.totals["hybrid"].collectives.items() if (key.kind, key.axes) == ("all-gather", ("y",))
    )
    assert 0.5 * gathers[("y",)] <= compiled <= gathers[("y",)]
    assert real.memory["padding"] >= 0 and real.fits


@needs_compiler
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p-16", "v5e-4", "v6e:1x1", "v6e:2x4"])
def test_the_compiler_knows_every_chip(name):
    topology = parse_topology(name)
    devices = topology_devices(topology)
    assert len(devices) == topology.size and {d.device_kind for d in devices} == {topology.chip.device_kind}


@needs_compiler
@pytest.mark.parametrize(("x", "y"), [(64, 1), (16, 4), (8, 8), (2, 32)])
def test_a_mesh_may_split_a_torus_axis(x, y):
    mesh = make_mesh(MeshConfig(x=x, y=y), topology_devices(parse_topology("v5p:4x4x4")))
    assert dict(mesh.shape) == {"x": x, "y": y} and len({d.id for d in mesh.devices.flat}) == 64
