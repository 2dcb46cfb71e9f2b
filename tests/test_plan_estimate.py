"""Instant estimates against counts by hand, for a model small enough to count: L layers of width M, F = 4 M, rows of T tokens."""

import dataclasses
import math

import pytest

from mutransformer.config.load import load
from mutransformer.errors import ConfigError
from mutransformer.model.transformer import flops_per_token
from mutransformer.planning import case, chips, search
from mutransformer.planning.estimate import estimate, torus_axes
from mutransformer.planning.kernels import Kernels

L, M, T, B, V = 3, 256, 64, 32, 1024
MODEL = ["model.d_model=256", "model.d_head=64", f"model.n_layer={L}", f"model.n_vocab={V}", f"data.seq_len={T}"]
LAYER, ENDS = 12 * M * M, 2 * M * V  # weights: of a layer; of embedding and unembedding


def planned(*args: str, mesh: str = "x=4,y=2", topology: str = "v5e:2x4"):
    config = load([*MODEL, f"data.batch_size={B}", *args])
    return estimate(case.make(case.read_mesh(mesh, config), chips.parse(topology)), Kernels())


def moved(found) -> dict[tuple[str, str], tuple[int, float]]:
    return {(each.kind, " ".join(each.axes)): (each.count, each.bytes) for each in found.traffic}


def test_without_rematerialisation_only_attention_repeats_anything():
    found = planned("model.remat=none")
    assert found.flops["model"] == flops_per_token(found.case.config) * B * T / 8
    # So short a row is one block of attention, and nothing of the masked half is left out; q k^T is computed again backward.
    assert found.flops["matmul"] == found.flops["model"] + L * 2 * T * M * B * T / 8
    assert found.parameters == L * LAYER + ENDS


def test_full_rematerialisation_repeats_all_of_a_layer_but_its_last_product():
    none, full = planned("model.remat=none"), planned("model.remat=full")
    again = L * (2 * (LAYER - 4 * M * M) + 4 * T * M) * B * T / 8
    assert full.flops["matmul"] - none.flops["matmul"] == again
    assert full.memory["kept"] < none.memory["kept"]
    assert full.memory["kept"] >= L * (B // 4) * T * (M // 2) * 2  # a layer's input each, bfloat16


def test_collectives_by_hand():
    found = planned("model.remat=none")
    b, whole = B // 4, moved(found)
    ends = ENDS // 2 * 2  # bfloat16, of a half along y
    assert whole["all-gather", "x"] == (L * 12 + 2, L * 2 * LAYER // 2 * 2 + ends)  # forward, backward
    assert whole["reduce-scatter", "x"] == (L * 6 + 2, (L * LAYER + ENDS) // 2 * 4)  # float32
    activation = b * T * M * 2
    assert whole["all-gather", "y"] == (L * 4 + 1, (L * 4 + 1) * activation)
    assert whole["reduce-scatter", "y"] == (L * 4 + 1, (L * 4 + 1) * activation)
    assert set(whole) - {("all-reduce", "x"), ("all-reduce", "y")} == {
        *(("all-gather", "x"), ("reduce-scatter", "x"), ("all-gather", "y"), ("reduce-scatter", "y")),
    }


def test_an_axis_of_one_moves_nothing():
    assert {axis for each in planned(mesh="x=8,y=1").traffic for axis in each.axes} == {"x"}
    assert {axis for each in planned(mesh="x=1,y=4", topology="v5e:2x2").traffic for axis in each.axes} == {"y"}


def test_microbatches_gather_weights_again_and_hold_less():
    one, four = planned("model.remat=full"), planned("optim.grad_accumulation_steps=4", "model.remat=full")
    assert moved(four)["all-gather", "x"][1] == 4 * moved(one)["all-gather", "x"][1]
    assert moved(four)["all-gather", "y"][1] == moved(one)["all-gather", "y"][1]
    assert four.flops == one.flops
    assert four.memory["working"] < one.memory["working"]


@pytest.mark.parametrize(("moment", "bytes_"), [("float32", 8), ("bfloat16", 6)])
def test_state_is_spread_over_all_chips(moment, bytes_):
    found = planned(f"precision.mu_dtype={moment}")
    n = (L * LAYER + ENDS) / 8
    assert found.memory["parameters"] == 4 * n
    assert bytes_ * n <= found.memory["optimizer"] <= bytes_ * n + 64  # and counters
    assert found.memory["batch"] == B // 4 * T * 5  # int32 and a mask


def test_the_largest_bound_bounds():
    found = planned()
    chip = found.case.topology.chip
    assert found.bounds["MXU"] == found.flops["matmul"] / chip.peak_flops
    assert found.bounds["HBM"] == found.hbm_bytes / chip.hbm_bandwidth
    assert found.seconds == max(found.bounds.values()) == found.bounds[found.bound]
    assert found.guess > found.seconds
    run = found.run(0.5)
    assert run["days"] == found.case.config.steps * 0.5 / 86400
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
def test_rings_that_serve_an_axis(topology, sizes, axes, rings):
    assert torus_axes(chips.parse(topology), sizes, axes) == rings


def test_attention_is_whole_without_a_kernel():
    found = planned("model.remat=none", "data.seq_len=512", "data.batch_size=4", "model.attention_kernel=xla")
    pair = L * 2 * 512 * M * 4 * 512 / 8  # a product of attention; the logits are computed again backward
    assert found.flops["matmul"] == found.flops["model"] + pair


@pytest.mark.parametrize("mesh", ["x=3,y=1", "z=8", "x=", "x=4", "x=4;y=2", "x=0,y=8", "x=-1"])
def test_a_mesh_that_is_none_is_told(mesh):
    with pytest.raises(ConfigError, match="mesh"):
        planned(mesh=mesh)


def test_y_alone_leaves_the_rest_to_x():
    assert planned(mesh="y=2").case.sizes == {"x": 4, "y": 2}


def test_a_batch_too_small_for_the_mesh_is_told():
    with pytest.raises(ConfigError, match=r"rows at a time = 32: not divisible by mesh.x = 64"):
        planned(mesh="x=64,y=1", topology="v5p:4x4x4")


def test_a_search_ranks_what_fits():
    config = load([*MODEL, f"data.batch_size={B}"])
    found = search.search(config, chips.parse("v5e:2x2"), Kernels())
    guesses = [each.guess for each in found]
    assert guesses == sorted(guesses) and all(each.fits for each in found)
    tried = {(each.case.sizes["y"], each.case.config.model.remat) for each in found}
    assert tried == {(y, policy) for y in (1, 2, 4) for policy in search.policies()}  # 4 heads
    assert {"none", "full"} <= set(search.policies())
    assert "mesh.x=" in search.describe(found[0].case)


def small(gigabytes: float) -> chips.Topology:
    topology = chips.parse("v5e:1x1")
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, hbm_bytes=gigabytes * 1e9))


def test_a_search_takes_as_many_microbatches_as_memory_asks_for():
    config = load([*MODEL, "data.batch_size=64"])
    whole = search.search(config, small(16), Kernels())
    assert all(each.case.config.optim.grad_accumulation_steps == 1 for each in whole)
    least = min(each.peak for each in whole)
    tight = search.search(config, small(0.8 * least / 1e9), Kernels())
    assert tight and all(each.peak <= 0.8 * least and each.case.config.optim.grad_accumulation_steps > 1 for each in tight)
    one_row = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    with pytest.raises(ConfigError, match="nothing fits on v5e:1x1: the least is"):
        search.search(one_row, small(0.001), Kernels())


def test_a_search_says_why_no_mesh_is_possible():
    config = load([*MODEL, "data.batch_size=3", "model.d_model=192"])
    with pytest.raises(ConfigError, match="not divisible by mesh"):
        search.search(config, chips.parse("v5e:2x4"), Kernels())


def test_policies_are_compared_for_one_case():
    found = planned("model.remat=full")
    each = search.by_policy(found, Kernels())
    assert each["full"] is found and set(each) == set(search.policies())
    assert each["none"].memory["kept"] > found.memory["kept"]
    assert math.isclose(each["none"].memory["parameters"], found.memory["parameters"])
