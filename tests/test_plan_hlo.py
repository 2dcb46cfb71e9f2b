"""HLO text parsed and replayed, compared with times by hand.

The two steps in data/hlo were written by the TPU compiler (libtpu 0.0.42), without attributes that the parser ignores: 6 layers
of width 256, feed-forward 1024, vocabulary 1024, 16 rows of 64 tokens, model.remat=full, mesh 4 x 2.
"""

from pathlib import Path

import pytest

from mutransformer.planning.chips import CHIPS
from mutransformer.planning.compiled import hlo
from mutransformer.planning.compiled.cost_model import Costing, TpuCosts, axes_of, first_group
from mutransformer.planning.compiled.hlo import trip_count
from mutransformer.planning.compiled.replay import replay as schedule_of
from mutransformer.planning.compiled.simulate import COSTINGS, CollectiveKey, Totals, totals
from mutransformer.planning.kernel_flops import KernelFlops, causal_fraction
from mutransformer.planning.topology import HBM_EFFICIENCY

DATA = Path(__file__).parent / "data" / "hlo"
V5P = CHIPS["v5p"]
MICRO = 1e-6

# On v5p: 1750 cycles are 1 us; 2.4 MB over 4 devices take 10 us to gather, and 1 us of latency.
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
CYCLES = 'backend_config={"estimated_cycles":"%d"}'
HEAD = """HloModule step, is_scheduled=true, num_partitions=8

%product () -> () {
  %l = f32[8,8] parameter(0)
  ROOT %c = f32[8,8] convolution(%l, %l)
}
"""


def replay(body: str, kernels: KernelFlops | None = None, costing: Costing = "hybrid", mesh=None, more: str = "") -> Totals:
    module = hlo.parse(f"{HEAD}{more}\nENTRY %main () -> () {{\n{body}\n}}\n")
    return totals(schedule_of(TpuCosts(module, mesh or {"x": 2, "y": 4}, kernels or KernelFlops(), V5P, costing)))


def matmul(name: str, microseconds: int) -> str:
    return f"  %{name} = f32[8,8] fusion(%p), calls=%product, {CYCLES % (1750 * microseconds)}\n"


P = "  %p = f32[600000] parameter(0)\n"
START = f"  %s = (f32[150000], f32[600000]) all-gather-start(%p), channel_id=1, {GROUPS}, dimensions={{0}}\n"
DONE = "  %d = f32[600000] all-gather-done(%s)\n"
SYNC = f"  %a = f32[600000] all-reduce(%p), channel_id=2, {GROUPS}, to_apply=%sum\n"


def test_an_async_collective_is_exposed_where_it_is_used():
    t = replay(P + START + matmul("m", 4) + DONE)
    assert t.seconds == pytest.approx(11 * MICRO) and t.by_kind["matmul"] == pytest.approx(4 * MICRO)
    gather = t.collectives[CollectiveKey("all-gather", ("y",), 4, True)]
    assert (gather.count, gather.bytes, gather.wire_bytes) == (1, 2.4e6, 1.8e6)
    assert gather.seconds == pytest.approx(11 * MICRO) and gather.exposed_seconds == pytest.approx(7 * MICRO)


def test_enough_compute_hides_an_async_collective():
    t = replay(P + START + matmul("m", 15) + DONE)
    assert t.seconds == pytest.approx(15 * MICRO) and t.exposed_seconds == 0


def test_a_sync_collective_blocks_and_queues_on_its_links():
    # An all-reduce moves twice as much: 20 + 1 us; it queues behind the gather that has 11 - 4 us to go.
    alone, behind = replay(P + SYNC), replay(P + START + matmul("m", 4) + SYNC + DONE)
    assert alone.seconds == pytest.approx(21 * MICRO)
    assert behind.seconds == pytest.approx((11 + 21) * MICRO)
    assert behind.collectives[CollectiveKey("all-reduce", ("y",), 4, False)].exposed_seconds == pytest.approx(28 * MICRO)


def test_collectives_on_other_links_do_not_queue():
    other = SYNC.replace(GROUPS, "replica_groups={{0,4},{1,5},{2,6},{3,7}}")  # over x: 2 x 2.4 MB / 2 at 180 GB/s and 1 us
    t = replay(P + START + other + DONE)
    assert t.seconds == pytest.approx((2.4e6 / 1.8e11) + MICRO)


def test_permutes_in_opposite_directions_do_not_queue():
    # 2.4 MB over one direction of a link, 90 GB/s: 26.7 + 1 us.
    def ring(name: str, step: int) -> str:
        pairs = ",".join(f"{{{i},{i // 4 * 4 + (i + step) % 4}}}" for i in range(8))
        start = (
            f"  %{name} = (f32[600000], f32[600000]) collective-permute-start(%p), channel_id=3, source_target_pairs={{{pairs}}}"
        )
        return f"{start}\n"

    def end(name: str) -> str:
        return f"  %{name}d = f32[600000] collective-permute-done(%{name})\n"

    once = 2.4e6 / 0.9e11 + MICRO
    assert replay(P + ring("a", 1) + ring("b", -1) + end("a") + end("b")).seconds == pytest.approx(once)
    assert replay(P + ring("a", 1) + ring("b", 1) + end("a") + end("b")).seconds == pytest.approx(2 * once)


LOOP = """
%step (s) -> () {
  %b = s32[] parameter(0)
  %one = s32[] constant(2)
  ROOT %next = s32[] add(%b, %one)
}

%body () -> () {
  %state = (s32[], f32[600000]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[600000] get-tuple-element(%state), index=1
  %inc = s32[] fusion(%i), calls=%step
  %m = f32[8,8] fusion(%x), calls=%product, backend_config={"estimated_cycles":"3500"}
  ROOT %out = (s32[], f32[600000]) tuple(%inc, %x)
}

%condition () -> () {
  %cs = (s32[], f32[600000]) parameter(0)
  %limit = s32[] constant(11)
  %ci = s32[] get-tuple-element(%cs), index=0
  ROOT %lt = pred[] compare(%ci, %limit), direction=LT
}
"""
WHILE = (
    P
    + "  %zero = s32[] constant(1)\n  %init = (s32[], f32[600000]) tuple(%zero, %p)\n"
    + "  %w = (s32[], f32[600000]) while(%init), condition=%condition, body=%body\n"
)


def test_trip_count_follows_from_start_limit_and_step():
    t = replay(WHILE, more=LOOP)  # 1, 3, 5, 7, 9
    assert t.seconds == pytest.approx(5 * 2 * MICRO) and not t.warnings
    assert replay(WHILE, more=LOOP.replace("direction=LT", "direction=LE")).seconds == pytest.approx(6 * 2 * MICRO)
    assert replay(WHILE, more=LOOP.replace("constant(11)", "constant(12)")).seconds == pytest.approx(6 * 2 * MICRO)
    down = LOOP.replace("constant(2)", "constant(-3)").replace("constant(11)", "constant(-5)").replace("LT", "GT")
    assert replay(WHILE, more=down).seconds == pytest.approx(2 * 2 * MICRO)


def test_an_unknown_trip_count_is_a_warning():
    t = replay(WHILE, more=LOOP.replace("constant(11)", "add(%cs, %cs)"))
    assert t.seconds == pytest.approx(2 * MICRO) and "unknown number of rounds" in t.warnings[0]


def test_a_trip_count_in_the_text_is_used():
    known = WHILE.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert replay(known, more=LOOP).seconds == pytest.approx(7 * 2 * MICRO)


def test_a_memory_transfer_overlaps_compute():
    copy = "  %cs = (f32[600000]{:S(1)}, f32[600000], u32[]) copy-start(%p)\n"
    done = "  %cd = f32[600000]{:S(1)} copy-done(%cs)\n"
    needs = 2.4e6 / (V5P.hbm_bandwidth * HBM_EFFICIENCY)
    alone, beside = replay(P + copy + done), replay(P + copy + matmul("m", 2) + done)
    assert alone.seconds == pytest.approx(needs) and alone.by_kind["wait"] == pytest.approx(needs)
    assert beside.seconds == pytest.approx(2 * MICRO) and beside.by_kind["wait"] == 0


def test_costings_differ_except_for_matrix_products():
    op = f"  %e = f32[600000] fusion(%p), calls=%sum, {CYCLES % 17500}\n"
    assert replay(P + op, costing="cycles").seconds == pytest.approx(10 * MICRO)
    assert replay(P + op).seconds == pytest.approx(4.8e6 / (V5P.hbm_bandwidth * HBM_EFFICIENCY))
    in_vmem = op.replace("f32[600000] fusion", "f32[600000]{1:S(1)} fusion")
    assert replay(P + in_vmem).seconds == pytest.approx(2.4e6 / (V5P.hbm_bandwidth * HBM_EFFICIENCY))


KERNEL = """  %q = bf16[4,2,1024,128] parameter(1)
  %k = f32[4,2,1024,128] custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", metadata={op_name="jit/splash_mha_fwd_x"}
"""


def test_pallas_kernels_are_not_free():
    # 2 products of 2 x 1024 x 1024 x 128 FLOPs for 8 heads, of which blocks of 512 keep 3/4, at half of peak.
    flops = 2 * 2 * 8 * 1024 * 1024 * 128 * 0.75
    assert replay(KERNEL).seconds == pytest.approx(flops / (0.5 * V5P.peak_flops))
    assert replay(KERNEL, KernelFlops(efficiency=1.0)).seconds == pytest.approx(flops / V5P.peak_flops)
    assert replay(KERNEL, KernelFlops({"splash": 1e10})).seconds == pytest.approx(1e10 / (0.5 * V5P.peak_flops))
    unknown = replay(KERNEL.replace("splash_mha_fwd", "mystery"))
    assert unknown.seconds < flops / V5P.peak_flops and "mystery" in unknown.warnings[0]


@pytest.mark.parametrize(("phase", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_flops_of_splash_attention(phase, products):
    q = (2, 1024, 64)
    one = 2 * 2 * 1024 * 1024 * 64
    name, details = f"splash_mqa_{phase}_no_residuals", '"{\\"block_q_dq\\": 1024, \\"block_kv_dq\\": 1024}"'
    assert KernelFlops().of_call(name, [q, q, q], [q], details) == products * one
    assert KernelFlops().of_call(name, [q, q, q], [q]) == products * one * 0.75
    assert KernelFlops().of_call("other", [q], [q]) is None
    fused = KernelFlops().of_call("splash_mha_dkv_no_residuals", [q, q, q], [(4, 2, 1024, 64), q, q], details)
    assert fused == 5 * one  # also returns dq, one part per block of keys


def test_fraction_of_blocks_that_the_mask_keeps():
    assert causal_fraction(2048, 512, 512) == 10 / 16
    assert causal_fraction(2048, 2048, 2048) == 1
    assert causal_fraction(1024, 256, 512) == (1 + 1 + 2 + 2) / 8


@pytest.mark.parametrize(
    ("attrs", "group", "axes"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", [0, 4], ("x",)),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3], ("y",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4], ("x",)),
        ("replica_groups=[1,8]<=[8]", list(range(8)), ("x", "y")),
        ("replica_groups=mesh['x'=2, 'y'=4] {'y'}", [0, 1, 2, 3], ("y",)),
        ("replica_groups=mesh['x'=2, 'y'=4], device_ids=([4,2]T(1,0)) {'x'}", [0, 1], ("y",)),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", [0, 1], ("y",)),
        ("replica_groups={}", list(range(8)), ("x", "y")),
    ],
)
def test_replica_groups_in_every_form(attrs, group, axes):
    assert first_group(attrs, 8) == group
    assert axes_of(group, {"x": 2, "y": 4}) == axes


def test_an_algorithm_on_several_torus_axes_is_faster():
    config = '{"collective_algorithm_config":{"strategy":"UniDirectionNDRing","debug":"cores:{4 4 1}"}}'
    t = replay(P + SYNC.rstrip() + f", backend_config={config}\n")
    assert t.seconds == pytest.approx((20 / 2 + 1) * MICRO)


def test_a_mesh_of_three_axes():
    t = replay(P + SYNC, mesh={"slice": 2, "x": 2, "y": 2})
    assert list(t.collectives) == [CollectiveKey("all-reduce", ("x", "y"), 4, False)]


def test_an_unscheduled_module_is_refused():
    with pytest.raises(ValueError, match="scheduled"):
        hlo.parse("HloModule a\n\nENTRY %main () -> () {\n}\n")


def test_attributes_may_span_several_lines():
    kernel = '  %k = f32[8] custom-call(%p), metadata={op_name="a"}, kernel_metadata="{\n}\n b"\n'
    ops = hlo.parse(f"{HEAD}\nENTRY %main () -> () {{\n{P}{kernel}}}\n").computations["main"]
    assert [op.name for op in ops] == ["p", "k"] and ops[1].attrs.endswith('b"')


@pytest.fixture(scope="module", params=["v5e", "v5p"])
def step(request):
    module = hlo.parse((DATA / f"step_{request.param}_4x2.hlo").read_text())
    chip = CHIPS[request.param]
    costs = {c: TpuCosts(module, {"x": 4, "y": 2}, KernelFlops(), chip, c) for c in COSTINGS}
    return request.param, module, {c: schedule_of(costs[c]) for c in costs}


def test_loops_of_a_step(step):
    _, module, schedules = step
    assert [loop.n for loop in schedules["hybrid"].loops] == [6, 4, 6]  # layers; chunks of the head: 256 tokens by 64; layers
    loops = [op for op in module.computations[module.entry] if op.opcode == "while"]
    assert [trip_count(module, op) for op in loops] == [6, 4, 6]


def total(t, kind: str, *axes: str) -> tuple[float, float]:
    """Count and bytes, synchronous and asynchronous."""
    found = [sums for key, sums in t.collectives.items() if key.kind == kind and key.axes == axes]
    return sum(sums.count for sums in found), sum(sums.bytes for sums in found)


def test_collectives_of_a_step(step):
    _, _, schedules = step
    t = totals(schedules["hybrid"])
    assert not t.warnings
    # Activations [4, 64, 256], bf16: 2 a layer forward, the same again recomputed, 2 for gradients of scatters; 1 for the head.
    assert total(t, "all-gather", "y") == (6 * 6 + 1, (6 * 6 + 1) * 4 * 64 * 256 * 2)
    # Weights, bf16, their half along y: 4 of 256 x 128 and 2 of 256 x 512 a layer, forward and backward; embedding, unembedding.
    layer, ends = 4 * 256 * 128 + 2 * 256 * 512, 2 * 1024 * 128
    assert total(t, "all-gather", "x") == (6 * 2 * 6 + 2, (6 * 2 * layer + ends) * 2)
    # Their gradients, float32, scattered or, where the compiler prefers it, all-reduced; and two scalars of the loss.
    scattered, reduced = total(t, "reduce-scatter", "x"), total(t, "all-reduce", "x")
    assert scattered[1] + reduced[1] == (6 * layer + ends) * 4 + 2 * 4


def test_times_of_a_step(step):
    name, _, schedules = step
    hybrid, cycles = totals(schedules["hybrid"]), totals(schedules["cycles"])
    # From a separately written estimator, on the unabridged text: step, matrix products, exposed communication.
    expected = {"v5e": (654.775e-6, 203.871e-6, 430.003e-6), "v5p": (710.946e-6, 366.993e-6, 319.183e-6)}[name]
    assert (hybrid.seconds, hybrid.by_kind["matmul"], hybrid.exposed_seconds) == pytest.approx(expected, rel=1e-5)
    assert hybrid.seconds < cycles.seconds and hybrid.by_kind["matmul"] == cycles.by_kind["matmul"]
    assert hybrid.seconds == pytest.approx(hybrid.compute_seconds + hybrid.exposed_seconds + hybrid.by_kind["wait"])


def test_asynchronous_fusions_hide_gathers_on_v5e(step):
    name, _, schedules = step
    t = totals(schedules["hybrid"])
    hidden = sum(sums.seconds - sums.exposed_seconds for key, sums in t.collectives.items() if key.is_async)
    if name == "v5e":
        assert hidden == pytest.approx(t.communication_seconds - t.exposed_seconds) and hidden > 40 * MICRO
    else:
        assert not any(key.is_async for key in t.collectives)
