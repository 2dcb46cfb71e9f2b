"""Estimates compared with counts by hand, for L layers of width M, F = 4 M, rows of T tokens."""

import dataclasses
import functools

import pytest

from mutransformer.config.load import load
from mutransformer.errors import ConfigError
from mutransformer.planning.chips import parse_slice, torus_rings
from mutransformer.planning.estimate.bounds import Estimate, estimate, make_scenario, with_mesh
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.machines import parse_topology
from mutransformer.planning.plan import by_remat_policy, remat_policies, search
from mutransformer.planning.topology import Topology

L, M, T, B, V = 3, 256, 64, 32, 1024
MODEL = ["model.d_model=256", "model.d_head=64", f"model.n_layer={L}", f"model.n_vocab={V}", f"data.seq_len={T}"]
LAYER, ENDS = 12 * M * M, 2 * M * V  # weights: of a layer; of embedding and unembedding


@functools.cache
def estimated(*args: str, mesh: str = "x=4,y=2", topology: str = "v5e:2x4") -> Estimate:
    config = load([*MODEL, f"data.batch_size={B}", *args])
    return estimate(make_scenario(with_mesh(config, mesh), parse_topology(topology)), KernelFlops())


def traffic(found: Estimate) -> dict[tuple[str, str], tuple[int, float]]:
    return {(each.kind, " ".join(each.axes)): (each.count, each.bytes) for each in found.traffic}


def test_without_remat_only_attention_is_recomputed():
    found = estimated("model.remat=none")
    assert found.flops["model"] == found.scenario.program.flops_per_token * B * T / 8
    # So short a row is one block of attention, and nothing of the masked half is left out; q k^T is computed again backward.
    assert found.flops["matmul"] == found.flops["model"] + L * 2 * T * M * B * T / 8
    assert found.parameters == L * LAYER + ENDS


def test_heads_that_are_wider_together_than_the_model():
    """By hand: projections of M x 2 M, and attention over twice the heads."""
    found = estimated("model.remat=none", "model.attention_multiple=2")
    weights = L * (4 * 2 + 8) * M * M + M * V
    model = 6 * weights + 12 * L * 2 * M * T
    assert found.flops["model"] == model * B * T / 8
    assert found.flops["matmul"] == found.flops["model"] + L * 2 * T * 2 * M * B * T / 8
    assert found.parameters == weights + M * V
    assert traffic(found)["all-gather", "y"] == traffic(estimated("model.remat=none"))["all-gather", "y"]
    with pytest.raises(ConfigError, match=r"^model.attention_multiple x model.d_model / model.d_head: heads = 1: not divisible"):
        estimated("model.attention_multiple=0.25")


def test_full_remat_repeats_a_layer_but_its_last_product():
    none, full = estimated("model.remat=none"), estimated("model.remat=full")
    again = L * (2 * (LAYER - 4 * M * M) + 4 * T * M) * B * T / 8
    assert full.flops["matmul"] - none.flops["matmul"] == again
    assert full.memory["kept"] < none.memory["kept"]
    assert full.memory["kept"] >= L * (B // 4) * T * (M // 2) * 2  # a layer's input each, bfloat16


def test_collectives_of_a_step():
    found = estimated("model.remat=none")
    b, whole = B // 4, traffic(found)
    ends = ENDS // 2 * 2  # bfloat16, of a half along y
    assert whole["all-gather", "x"] == (L * 12 + 2, L * 2 * LAYER // 2 * 2 + ends)  # forward, backward
    assert whole["reduce-scatter", "x"] == (L * 6 + 2, (L * LAYER + ENDS) // 2 * 4)  # float32
    activation = b * T * M * 2
    assert whole["all-gather", "y"] == (L * 4 + 1, (L * 4 + 1) * activation)
    assert whole["reduce-scatter", "y"] == (L * 4 + 1, (L * 4 + 1) * activation)
    assert set(whole) - {("all-reduce", "x"), ("all-reduce", "y")} == {
        ("all-gather", "x"),
        ("reduce-scatter", "x"),
        ("all-gather", "y"),
        ("reduce-scatter", "y"),
    }


def test_a_mesh_axis_of_one_moves_nothing():
    assert {axis for each in estimated(mesh="x=8,y=1").traffic for axis in each.axes} == {"x"}
    assert {axis for each in estimated(mesh="x=1,y=4", topology="v5e:2x2").traffic for axis in each.axes} == {"y"}


def test_accumulation_gathers_weights_again_and_holds_less():
    one, four = estimated("model.remat=full"), estimated("optim.grad_accumulation_steps=4", "model.remat=full")
    assert traffic(four)["all-gather", "x"][1] == 4 * traffic(one)["all-gather", "x"][1]
    assert traffic(four)["all-gather", "y"][1] == traffic(one)["all-gather", "y"][1]
    assert four.flops == one.flops
    assert four.memory["working"] < one.memory["working"]


@pytest.mark.parametrize(("moment", "bytes_"), [("float32", 8), ("bfloat16", 6)])
def test_state_is_sharded_over_all_chips(moment, bytes_):
    found = estimated(f"precision.mu_dtype={moment}")
    n = (L * LAYER + ENDS) / 8
    assert found.memory["parameters"] == 4 * n
    assert bytes_ * n <= found.memory["optimizer"] <= bytes_ * n + 64  # and counters
    assert found.memory["batch"] == B // 4 * T * 5  # int32 and a mask


def test_the_largest_bound_is_the_bound():
    found = estimated()
    chip = found.scenario.topology.chip
    assert found.bounds["MXU"] == found.flops["matmul"] / chip.peak_flops
    assert found.bounds["HBM"] == found.hbm_bytes / chip.hbm_bandwidth
    assert found.seconds == max(found.bounds.values()) == found.bounds[found.bound]
    assert found.guess > found.seconds
    run = found.run(0.5)
    assert run["days"] == found.scenario.config.steps * 0.5 / 86400
    assert run["chip_hours"] == pytest.approx(run["days"] * 24 * 8)
    assert run["tokens_per_parameter"] == run["tokens"] / found.parameters


@pytest.mark.parametrize(
    ("topology", "sizes", "axes", "rings"),
    [
        ("v5p:4x4x4", {"x": 64, "y": 1}, ("x",), 3),
        ("v5p:4x4x4", {"x": 16, "y": 4}, ("x",), 2),
        ("v5p:4x4x4", {"x": 16, "y": 4}, ("y",), 1),
        ("v5p:4x4x4", {"x": 8, "y": 8}, ("y",), 1.5),  # a ring, and a part of one
        ("v5p:4x4x4", {"x": 32, "y": 2}, ("y",), 0.5),
        ("v5p:4x4x4", {"x": 16, "y": 4}, ("x", "y"), 3),
        ("v5e:8x8", {"x": 8, "y": 8}, ("x",), 0.5),  # a line
        ("v5e:16x16", {"x": 16, "y": 16}, ("y",), 1),
    ],
)
def test_torus_rings_of_mesh_axes(topology, sizes, axes, rings):
    assert torus_rings(parse_slice(topology), sizes, axes) == rings


def test_attention_without_a_kernel_computes_the_masked_half():
    found = estimated("model.remat=none", "data.seq_len=512", "data.batch_size=4", "model.attention_kernel=xla")
    pair = L * 2 * 512 * M * 4 * 512 / 8  # a product of attention; the logits are computed again backward
    assert found.flops["matmul"] == found.flops["model"] + pair


@pytest.mark.parametrize("mesh", ["x=3,y=1", "z=8", "x=", "x=4", "x=4;y=2", "x=0,y=8", "x=-1"])
def test_a_bad_mesh_is_refused(mesh):
    with pytest.raises(ConfigError, match="mesh"):
        estimated(mesh=mesh)


def test_x_takes_what_y_leaves():
    assert estimated(mesh="y=2").scenario.mesh_sizes == {"x": 4, "y": 2}


def test_a_batch_too_small_for_the_mesh_is_refused():
    with pytest.raises(ConfigError, match=r"rows at a time = 32: not divisible by mesh.x = 64"):
        estimated(mesh="x=64,y=1", topology="v5p:4x4x4")


def small(gigabytes: float) -> Topology:
    topology = parse_topology("v5e:1x1")
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, hbm_bytes=gigabytes * 1e9))


@pytest.fixture
def two_policies(monkeypatch) -> tuple[str, ...]:
    """A search over two remat policies instead of all."""
    monkeypatch.setattr("mutransformer.planning.plan.remat_policies", lambda: ("none", "full"))
    return ("none", "full")


def test_a_search_ranks_what_fits(two_policies):
    found = search(load([*MODEL, f"data.batch_size={B}"]), parse_topology("v5e:2x2"), KernelFlops())
    guesses = [each.guess for each in found]
    assert guesses == sorted(guesses) and all(each.fits for each in found)
    tried = {(each.scenario.mesh_sizes["y"], each.scenario.config.model.remat) for each in found}
    assert tried == {(y, policy) for y in (1, 2, 4) for policy in two_policies}  # 4 heads
    assert "mesh.x=" in found[0].scenario.settings


def test_a_search_accumulates_as_often_as_memory_requires(two_policies):
    config = load([*MODEL, "data.batch_size=64"])
    roomy = search(config, small(16), KernelFlops())
    assert all(each.scenario.program.execution.microbatches == 1 for each in roomy)
    limit = 0.8 * min(each.peak_bytes for each in roomy)
    tight = search(config, small(limit / 1e9), KernelFlops())
    assert {each.scenario.config.model.remat for each in tight} == set(two_policies)
    assert all(each.peak_bytes <= limit and each.scenario.program.execution.microbatches > 1 for each in tight)
    one_row = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    with pytest.raises(ConfigError, match="nothing fits on v5e:1x1: the smallest needs"):
        search(one_row, small(0.001), KernelFlops())


def test_a_search_says_why_no_mesh_is_possible():
    config = load([*MODEL, "data.batch_size=3", "model.d_model=192"])
    with pytest.raises(ConfigError, match="not divisible by mesh"):
        search(config, parse_topology("v5e:2x4"), KernelFlops())


def test_remat_policies_are_compared():
    found = estimated("model.remat=full")
    by_policy = by_remat_policy(found, KernelFlops())
    assert by_policy["full"] is found and {"none", "full"} < set(by_policy) == set(remat_policies())
    assert by_policy["none"].memory["kept"] > found.memory["kept"]
    assert by_policy["none"].memory["parameters"] == found.memory["parameters"]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_layers_are_the_same_work(remat: str) -> None:
    loop, unrolled = (estimated(f"model.remat={remat}", f"model.unroll_layers={value}") for value in ("false", "true"))
    assert (unrolled.memory, unrolled.flops, unrolled.hbm_bytes) == (loop.memory, loop.flops, loop.hbm_bytes)
