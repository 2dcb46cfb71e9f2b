"""A GPU's schedule costed by the roofline, compared with times by hand; and a step compiled by XLA:GPU, where it is installed."""

import importlib.util

import pytest

from mutransformer.config.load import load
from mutransformer.errors import ConfigError
from mutransformer.planning.cards import Cluster, parse_cluster
from mutransformer.planning.compiled import hlo
from mutransformer.planning.compiled.compilers import compile_step, require_compiler, target_config, topology_devices
from mutransformer.planning.compiled.gpu_costs import GpuCosts
from mutransformer.planning.compiled.replay import replay as schedule_of
from mutransformer.planning.compiled.simulate import CollectiveKey, Overlap, Totals, overlaps, simulate, totals
from mutransformer.planning.estimate.bounds import estimate, make_scenario, with_mesh
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.machines import parse_topology

H100 = parse_cluster("h100:8")
PEAK, HBM, NVLINK, NETWORK = 0.7 * 989e12, 0.85 * 3350e9, 0.8 * 450e9, 0.8 * 50e9
HEAD = """HloModule step, is_scheduled=true, num_partitions=8

%gemm (a: bf16[4096,8192], b: bf16[8192,1024]) -> bf16[4096,1024] {
  %a = bf16[4096,8192]{1,0} parameter(0)
  %b = bf16[8192,1024]{1,0} parameter(1)
  ROOT %d = bf16[4096,1024]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%update (whole: f32[24,1000000], part: f32[1,1000000], i: s32[]) -> f32[24,1000000] {
  %whole = f32[24,1000000]{1,0} parameter(0)
  %part = f32[1,1000000]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %dus = f32[24,1000000]{1,0} dynamic-update-slice(%whole, %part, %i, %i)
}

%take (all: f32[24,1000000], j: s32[]) -> bf16[1,1000000] {
  %all = f32[24,1000000]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %ds = f32[1,1000000]{1,0} dynamic-slice(%all, %j, %j), dynamic_slice_sizes={1,1000000}
  ROOT %cv = bf16[1,1000000]{1,0} convert(%ds)
}
"""
P = """  %x = bf16[4096,8192]{1,0} parameter(0)
  %w = bf16[8192,1024]{1,0} parameter(1)
  %stack = f32[24,1000000]{1,0} parameter(2)
  %row = f32[1,1000000]{1,0} parameter(3)
  %n = s32[] parameter(4)
  %half = bf16[4000,1000]{1,0} parameter(5)
"""
# 32 MB over four of eight GPUs: each has 8 MB.
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
START = f"  %s = ((bf16[4000,1000]), (bf16[16000,1000])) all-gather-start(%half), channel_id=1, {GROUPS}, dimensions={{0}}\n"
DONE = "  %e = bf16[16000,1000]{1,0} all-gather-done(%s)\n"
GEMM = "  %g = bf16[4096,1024]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm\n"
GATHER = 0.75 * 32e6 / NVLINK + 15e-6
PRODUCT = 2 * 4096 * 8192 * 1024 / PEAK


def replayed(body: str, topology: Cluster = H100, mesh: dict[str, int] | None = None) -> tuple[Totals, list[Overlap]]:
    module = hlo.parse(f"{HEAD}\nENTRY %main () -> () {{\n{P}{body}}}\n")
    schedule = schedule_of(GpuCosts(module, mesh or {"x": 2, "y": 4}, KernelFlops(), topology))
    return totals(schedule), list(overlaps(schedule))


def test_a_product_takes_its_flops_or_its_bytes():
    t, _ = replayed(GEMM)
    assert t.seconds == t.by_kind["matmul"] == pytest.approx(PRODUCT)
    # One row: 8192 x 1024 weights are read for 2 x 8192 x 1024 FLOPs.
    thin = '  %g = bf16[1,1024]{1,0} custom-call(%v, %w), custom_call_target="__cublas$gemm", '
    thin += 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}\n'
    t, _ = replayed("  %v = bf16[1,8192]{1,0} parameter(6)\n" + thin)
    assert t.by_kind["matmul"] == pytest.approx(2 * (8192 + 8192 * 1024 + 1024) / HBM)


def test_float32_factors_have_half_of_the_peak():
    module = HEAD.replace("bf16[4096,8192]", "f32[4096,8192]")
    costs = GpuCosts(hlo.parse(f"{module}\nENTRY %main () -> () {{\n{P}{GEMM}}}\n"), {"x": 8, "y": 1}, KernelFlops(), H100)
    assert schedule_of(costs).seconds == pytest.approx(2 * PRODUCT)


def test_only_the_part_of_a_stack_that_is_used_counts():
    update = "  %u = f32[24,1000000]{1,0} fusion(%stack, %row, %n), kind=kLoop, calls=%update\n"
    t, _ = replayed(update)
    assert t.by_kind["other"] == pytest.approx((4e6 + 4 + 4e6) / HBM)  # reads the row and an index, writes the row
    take = "  %t = bf16[1,1000000]{1,0} fusion(%stack, %n), kind=kLoop, calls=%take\n"
    t, _ = replayed(take)
    assert t.by_kind["other"] == pytest.approx((4e6 + 4 + 2e6) / HBM)
    whole = "  %c = f32[24,1000000]{1,0} copy(%stack)\n"
    assert replayed(whole)[0].seconds == pytest.approx(2 * 96e6 / HBM)


def test_a_small_kernel_takes_two_microseconds():
    assert replayed("  %k = s32[] add(%n, %n)\n")[0].seconds == pytest.approx(2e-6)


def test_what_runs_beside_a_collective():
    t, (found,) = replayed(START + GEMM + DONE)
    assert GATHER < PRODUCT and t.seconds == pytest.approx(PRODUCT) and t.exposed_seconds == 0
    assert (found.where, found.times, dict(found.beside)) == ("step", 1, {"matmul": 1})
    assert found.beside_seconds == pytest.approx(PRODUCT) and found.collective.bytes == 32e6
    # Control: waited for at once, all of it is exposed.
    t, (found,) = replayed(START + DONE + GEMM)
    assert t.exposed_seconds == found.exposed_seconds == pytest.approx(GATHER) and not found.beside
    assert list(t.collectives) == [CollectiveKey("all-gather", ("y",), 4, True)]


def test_collectives_of_all_axes_share_one_queue():
    other = START.replace("%s =", "%r =").replace(GROUPS, "replica_groups={{0,4},{1,5},{2,6},{3,7}}")
    t, _ = replayed(START + other + DONE + DONE.replace("%e =", "%f =").replace("%s)", "%r)"))
    assert t.seconds == pytest.approx(GATHER + 0.5 * 32e6 / NVLINK + 15e-6)


def test_a_group_across_nodes_uses_the_network():
    # y = 4 on nodes of two: two nodes with two GPUs each. Half of the array over NVLink; half / 2 over the network, the slower.
    t, _ = replayed(START + DONE, parse_cluster("h100:4x2"))
    assert t.seconds == pytest.approx(32e6 / 4 / NETWORK + 40e-6)


def test_several_arrays_in_one_gather():
    both = "  %s = ((bf16[4000,1000], f32[1,1000000]), (bf16[16000,1000], f32[4,1000000])) all-gather-start(%half, %row), "
    t, (found,) = replayed(both + f"channel_id=1, {GROUPS}\n  %e = (bf16[16000,1000], f32[4,1000000]) all-gather-done(%s)\n")
    assert found.collective.bytes == 32e6 + 16e6


def test_a_start_that_xla_calls_synchronous_is_listed_as_such():
    sync = START.replace("dimensions", 'backend_config={"collective_backend_config":{"is_sync":true}}, dimensions')
    assert [key.is_async for key in replayed(sync + DONE)[0].collectives] == [False]


def test_cudnn_attention_takes_its_flops_at_half_of_peak():
    q = "bf16[4,2048,16,128]{3,2,1,0}"
    call = f"  %q = {q} parameter(6)\n  %o = ({q}, f32[4,16,2048]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), "
    call += 'custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/dot_product_attention_fwd"}\n'
    flops = 2 * 2 * 4 * 16 * 2048 * 2048 * 128 * (17 / 32)  # of 16 blocks of keys, 1 to 16 are read
    assert replayed(call)[0].by_kind["kernel"] == pytest.approx(flops / (0.5 * 989e12))


def test_a_missing_gpu_compiler_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[cuda\]'"):
        require_compiler(H100)
    with pytest.raises(ConfigError, match="no schedule"):
        require_compiler(parse_topology("here"))


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA plugin: pip install .[cuda]"
)


@needs_compiler
def test_a_step_compiles_for_gpus():
    """Code that cannot run on a GPU fails here: sharded over both axes, with cuDNN's attention and the options of the device."""
    args = [
        "model.d_model=256",
        "model.d_head=64",
        "model.n_layer=2",
        "model.n_vocab=1024",
        "data.seq_len=256",
        "data.batch_size=16",
    ]
    scenario = make_scenario(with_mesh(load([*args, "model.remat=dots"]), "x=2,y=2"), parse_topology("h100:4"))
    compiled = compile_step(scenario)
    assert "__cudnn$fmhaSoftmaxBackward" in compiled.text
    found = simulate(scenario, compiled, KernelFlops())
    assert found.fits and found.memory["padding"] >= 0 and not found.totals["roofline"].warnings
    counted = estimate(scenario, KernelFlops())
    assert counted.seconds < found.seconds < 0.1
    for kind in ("all-gather", "reduce-scatter"):  # the compiled program moves the bytes that the estimate counts
        for axis in ("x", "y"):
            moved = [sums.bytes for key, sums in found.totals["roofline"].collectives.items() if key[:2] == (kind, (axis,))]
            assert sum(moved) == pytest.approx(sum(t.bytes for t in counted.traffic if (t.kind, t.axes) == (kind, (axis,)))), kind


@needs_compiler
@pytest.mark.parametrize("name", ["a100:8", "h100:2x8", "h200", "b200:8", "gb200:4"])
def test_the_gpu_compiler_knows_every_card(name):
    cluster = parse_cluster(name)
    devices = topology_devices(cluster)
    assert len(devices) == cluster.size and {d.device_kind for d in devices} == {cluster.chip.device_kind}
    assert cluster.chip.device_kind in target_config(cluster.chip)
