"""Plans for GPUs: names, what collectives send over NVLink and the network, and estimates, compared with counts by hand."""

import dataclasses
import json

import pytest

from mutransformer.cli import main
from mutransformer.config.load import load
from mutransformer.errors import ConfigError
from mutransformer.planning.cards import CARDS, Cluster, nodes_of_group
from mutransformer.planning.estimate.bounds import Estimate, estimate, make_scenario, with_mesh
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.machines import Unrated, parse_topology
from mutransformer.planning.plan import by_remat_policy, plan, search
from mutransformer.planning.remedies import remedies

L, M, T, B, V = 3, 256, 64, 64, 1024
MODEL = ["model.d_model=256", "model.d_head=64", f"model.n_layer={L}", f"model.n_vocab={V}", f"data.seq_len={T}"]


def scenario(mesh: str, topology: str, *args: str):
    return make_scenario(with_mesh(load([*MODEL, f"data.batch_size={B}", *args]), mesh), parse_topology(topology))


def estimated(mesh: str, topology: str, *args: str) -> Estimate:
    return estimate(scenario(mesh, topology, *args), KernelFlops())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h100", (1, 1)),
        ("h100:8", (1, 8)),
        ("h100:4x8", (4, 8)),
        ("a100:2x4", (2, 4)),
        ("gb200:72", (1, 72)),
        ("b200:16x8", (16, 8)),
    ],
)
def test_names_of_nodes(name, shape):
    topology = parse_topology(name)
    assert isinstance(topology, Cluster) and (topology.nodes, topology.per_node) == shape
    assert topology.size == shape[0] * shape[1] and parse_topology(str(topology)) == topology


@pytest.mark.parametrize(
    "name", ["h100:", "h100-8", "h100:0", "h100:x8", "h100:8x", "h100:2x2x2", "h100:16", "gb200:73", "h100:08", "h100:1e1"]
)
def test_an_unknown_number_of_gpus_is_a_one_line_error(name):
    with pytest.raises(ConfigError, match="nodes x GPUs of each") as caught:
        parse_topology(name)
    assert "\n" not in str(caught.value) and f"--topology {name}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "peak", "memory", "bandwidth"),
    [
        ("a100", 312e12, 80e9, 2.039e12),
        ("h100", 989e12, 80e9, 3.35e12),
        ("h200", 989e12, 141e9, 4.8e12),
        ("b200", 2250e12, 1440e9 / 8, 64e12 / 8),
        ("gb200", 2500e12, 13.4e12 / 72, 576e12 / 72),
    ],
)
def test_figures_of_the_data_sheets(name, peak, memory, bandwidth):
    card = CARDS[name]
    assert card.peak_flops == peak
    assert (card.hbm_bytes, card.hbm_bandwidth) == pytest.approx((memory, bandwidth), rel=0.01)


GB = 1e9


@pytest.mark.parametrize(
    ("topology", "mesh", "axes", "kind", "nvlink", "network"),
    [
        # Within a node: 7/8 of the array, over NVLink.
        ("h100:8", {"x": 8, "y": 1}, ("x",), "all-gather", 7 / 8, 0),
        ("h100:8", {"x": 8, "y": 1}, ("x",), "all-reduce", 14 / 8, 0),
        ("h100:8", {"x": 2, "y": 4}, ("y",), "reduce-scatter", 3 / 4, 0),
        ("h100:8", {"x": 2, "y": 4}, ("y",), "all-to-all", 3 / 4, 0),
        # All of four nodes: a node lacks 3/4 of the array, each of its 8 GPUs fetches an eighth of that.
        ("h100:4x8", {"x": 32, "y": 1}, ("x",), "all-gather", 7 / 8, 3 / 32),
        ("h100:4x8", {"x": 32, "y": 1}, ("x",), "all-reduce", 14 / 8, 6 / 32),
        ("h100:4x8", {"x": 32, "y": 1}, ("x",), "all-to-all", 7 / 32, 24 / 32),
        ("h100:4x8", {"x": 32, "y": 1}, ("x",), "collective-permute", 0, 1),
        # y = 8 fills a node, so that x has one GPU in each of four.
        ("h100:4x8", {"x": 4, "y": 8}, ("y",), "all-gather", 7 / 8, 0),
        ("h100:4x8", {"x": 4, "y": 8}, ("x",), "all-gather", 0, 3 / 4),
        # y = 4: x has two GPUs in each node.
        ("h100:4x8", {"x": 8, "y": 4}, ("x",), "all-gather", 1 / 2, 3 / 8),
        # y = 16 goes over two nodes.
        ("h100:4x8", {"x": 2, "y": 16}, ("y",), "all-gather", 7 / 8, 1 / 16),
        # Replicas are outermost: one in each node.
        ("h100:4x8", {"z": 4, "x": 8, "y": 1}, ("x",), "all-gather", 7 / 8, 0),
        ("h100:4x8", {"z": 4, "x": 8, "y": 1}, ("z",), "all-reduce", 0, 6 / 4),
    ],
)
def test_what_a_collective_sends_over_nvlink_and_network(topology, mesh, axes, kind, nvlink, network):
    links = parse_topology(topology).links(kind, 32 * GB, mesh, axes)
    bandwidth = {"NVLink": 450 * GB, "network": 50 * GB}  # half of 900 GB/s; 400 Gbit/s
    expected = {"NVLink": nvlink, "network": network}
    assert set(links) == {unit for unit, share in expected.items() if share}
    for unit, use in links.items():
        assert use.bytes == pytest.approx(32 * GB * expected[unit])
        assert use.seconds == pytest.approx(32 * GB * expected[unit] / bandwidth[unit])


def test_the_order_of_mesh_axes_decides_what_crosses_nodes():
    assert nodes_of_group((("x", 4), ("y", 8)), ("x",), 8) == (4, 1)
    assert nodes_of_group((("y", 8), ("x", 4)), ("x",), 8) == (1, 4)  # control: x innermost stays within a node
    assert nodes_of_group((("x", 4), ("y", 8)), ("x", "y"), 8) == (4, 8)


def test_all_mesh_axes_share_the_ports_of_a_gpu():
    found = estimated("x=4,y=2", "h100:8")
    times = {axis: sum(t.seconds for t in found.traffic if t.axes == (axis,)) for axis in ("x", "y")}
    both = sum(t.seconds for t in found.traffic if len(t.axes) == 2)
    assert min(times.values()) > 0
    assert found.bounds["NVLink"] == pytest.approx(times["x"] + times["y"] + both)
    assert set(found.bounds) == {"tensor cores", "HBM", "NVLink"}
    assert set(estimated("x=8,y=2", "h100:2x8").bounds) == {"tensor cores", "HBM", "NVLink", "network"}


def test_cudnn_attention_is_counted_without_cudnn():
    found = estimated("x=8,y=1", "h100:8", "model.remat=none")
    # Forward q k^T and p v, backward five products; so short a row is one block, of which the mask leaves out nothing.
    product = 2 * (B // 8) * T * T * M
    assert found.scenario.program.execution.attention == "cudnn"
    assert found.flops["kernel"] == L * 7 * product
    full = estimated("x=8,y=1", "h100:8", "model.remat=full")
    assert full.flops["kernel"] == L * 9 * product
    assert found.bounds["tensor cores"] == (found.flops["matmul"] + found.flops["kernel"] / 0.5) / 989e12
    assert not found.unknown_kernels


def test_causal_rows_leave_out_blocks_of_128():
    flops = KernelFlops().of_call("dot_product_attention_bwd_wrapper", [(2, 512, 4, 64)] * 3, [])
    assert flops == 2 * 5 * 2 * 4 * 512 * 512 * 64 * (1 + 2 + 3 + 4) / 16
    assert KernelFlops().of_call("jit/while/dot_product_attention_fwd", [(2, 64, 4, 64)], []) == 2 * 2 * 2 * 4 * 64 * 64 * 64


@pytest.fixture
def two_policies(monkeypatch):
    """Plans over two remat policies instead of all."""
    monkeypatch.setattr("mutransformer.planning.plan.remat_policies", lambda: ("none", "full"))


def test_a_search_stays_on_the_gpus(two_policies):
    found = search(load([*MODEL, f"data.batch_size={B}"]), parse_topology("h100:2x1"), KernelFlops())
    assert {(each.scenario.mesh_sizes["x"], each.scenario.mesh_sizes["y"]) for each in found} == {(2, 1), (1, 2)}
    assert [each.guess for each in found] == sorted(each.guess for each in found)


def limited(found: Estimate, gigabytes: float) -> Estimate:
    """The same on GPUs with less memory."""
    topology = found.scenario.topology
    chip = dataclasses.replace(topology.chip, hbm_bytes=gigabytes * 1e9)
    return dataclasses.replace(
        found, scenario=dataclasses.replace(found.scenario, topology=dataclasses.replace(topology, chip=chip))
    )


def test_a_step_that_does_not_fit_names_what_would(two_policies):
    roomy = estimated("x=2,y=1", "h100:2", "model.remat=none")
    policies = by_remat_policy(roomy, KernelFlops())
    limit = (roomy.peak_bytes + policies["full"].peak_bytes) / 2
    tight = limited(roomy, limit / 1e9)
    found = remedies(tight, by_remat_policy(tight, KernelFlops()), KernelFlops(), limit)
    assert [each.settings.split("=")[0] for each in found] == [
        "model.remat",
        "optim.grad_accumulation_steps",
        "--topology h100:4 --mesh x",
    ]
    assert found[0].settings == "model.remat=full" and all(each.peak_bytes <= limit for each in found)
    steps = int(found[1].settings.split("=")[1])
    fewer = estimated("x=2,y=1", "h100:2", "model.remat=none", f"optim.grad_accumulation_steps={steps // 2}")
    enough = estimated("x=2,y=1", "h100:2", "model.remat=none", f"optim.grad_accumulation_steps={steps}")
    assert fewer.peak_bytes > limit >= enough.peak_bytes == found[1].peak_bytes
    assert not remedies(roomy, policies, KernelFlops(), roomy.peak_bytes)


def seconds_in(data) -> set[str]:
    """The keys of seconds and MFU anywhere in a plan."""
    if isinstance(data, list):
        return set().union(*map(seconds_in, data)) if data else set()
    if not isinstance(data, dict):
        return set()
    here = {key for key in data if "seconds" in key or "mfu" in key or key in ("bounds", "run_at_least")}
    return here.union(*map(seconds_in, data.values()))


@pytest.mark.parametrize("topology", ["h100:1", pytest.param("v5e:1x1", marks=pytest.mark.slow)])
def test_a_step_that_does_not_fit_has_no_time(topology, two_policies, monkeypatch):
    args = [*MODEL, f"data.batch_size={B}"]
    fitting = plan(load(args), topology)
    assert fitting.is_timed and {"step_seconds_at_least", "mfu_at_most"} <= seconds_in(fitting.as_json())
    assert "MFU" in str(fitting) and "would_fit" not in fitting.as_json()
    machine = parse_topology(topology)
    small = dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, hbm_bytes=fitting.estimate.peak_bytes * 0.9))
    monkeypatch.setattr("mutransformer.planning.plan.parse_topology", lambda _: small)
    tight = plan(load(args), topology)
    assert not tight.fits and not seconds_in({key: each for key, each in tight.as_json().items() if key != "chip"})
    assert "MFU" not in str(tight) and "DOES NOT FIT" in str(tight) and "model.remat=full" in str(tight)
    assert tight.as_json()["would_fit"]


def test_this_machine_has_memory_but_no_time(two_policies):
    machine = parse_topology("here")
    assert isinstance(machine, Unrated) and machine.chip.device_kind == "cpu"
    found = plan(load([*MODEL, f"data.batch_size={B}"]), "here")
    assert found.fits and not found.is_timed and found.estimate.bounds == {}
    assert not seconds_in({key: each for key, each in found.as_json().items() if key != "chip"})
    shown = str(found)
    assert "memory per device" in shown and "of cpu are not known" in shown and "MFU" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_the_command_as_typed(capsys, two_policies):
    assert main(["plan", *MODEL, "data.batch_size=64", "--topology", "h100:4x8", "--mesh", "x=8,y=4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["topology"], data["chips"], data["device_kind"]) == ("h100:4x8", 32, "NVIDIA H100 80GB HBM3")
    assert data["chip"]["nvlink_bandwidth"] == 450e9 and data["chip"]["network_bandwidth"] == 50e9
    assert main(["plan", *MODEL, "data.batch_size=64", "--topology", "h100:4x8", "--mesh", "x=8,y=4"]) == 0
    shown = capsys.readouterr().out
    assert "32 GPUs" in shown and "sent per GPU over NVLink" in shown and max(map(len, shown.splitlines())) <= 100


def test_more_devices_are_a_fuller_node_then_more_nodes():
    assert str(parse_topology("h100:4").larger()) == "h100:8"
    assert str(parse_topology("h100:8").larger()) == "h100:2x8"
    assert str(parse_topology("gb200:64").larger()) == "gb200:72"
    assert str(parse_topology("v5p:4x4x4").larger()) == "v5p:4x4x8"
    assert parse_topology("v5e:16x16").larger() is None
