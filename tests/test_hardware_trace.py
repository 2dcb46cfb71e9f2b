"""What the hardware report says of a trace, against traces that are written by hand: shares, gaps, longest operations, words."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import pytest

from mutransformer.planning.compiled.hlo import parse
from mutransformer.study.hardware.section import SectionFailed
from mutransformer.study.hardware.timeline import Event, Timeline, categories, gaps_in_words, in_words, meanwhile, timeline
from mutransformer.study.hardware.trace import read, summary

# A program as XLA prints it: a loop around a product, a fusion of attention, a gather, a copy, and the update.
HLO = """\
HloModule jit_train_step, is_scheduled=true

%inner (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%moved (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %copy.1 = f32[8,8]{0,1} copy(%q)
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %product = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%inner, metadata={op_name="jit(train_step)/jvp()/mlp/dot_general"}
  %loop.2 = f32[8,8]{1,0} while(%product), condition=%c, body=%b
  %softmax = f32[8,8]{1,0} fusion(%loop.2), kind=kLoop, calls=%moved, metadata={op_name="jit(f)/transpose(jvp(attention))/exp"}
  %all-gather.3 = f32[8,8]{1,0} all-gather(%softmax), replica_groups={{0,1}}, dimensions={0}
  %moved.4 = f32[8,8]{0,1} fusion(%all-gather.3), kind=kLoop, calls=%moved
  ROOT %update = f32[8,8]{1,0} add(%moved.4, %a)
}
"""
MODULE = parse(HLO)
# Of one step of 100 ms: name, start and end. The gather runs beside the product for 10 ms, and alone for 20.
STEP = [
    ("product", 0, 30),
    ("loop.2", 0, 50),  # a container
    ("all-gather.3", 20, 50),
    ("softmax", 60, 75),
    ("moved.4", 75, 80),
    ("update", 80, 90),
]
SHARES = {"matrix products": 30, "attention": 15, "other": 10, "copies": 5, "collectives": 20}


def events(n_steps: int = 2, every: float = 100) -> list[Event]:
    return [
        Event(name, 5 + (begin + every * i) / 1e3, 5 + (end + every * i) / 1e3)
        for i in range(n_steps)
        for name, begin, end in STEP
    ]


@pytest.fixture
def line() -> Timeline:
    return timeline(events(), 2, MODULE)


def test_shares_are_of_what_nothing_hides(line: Timeline) -> None:
    found = line.shares(categories(MODULE))
    total = 190.0  # ms, from the begin of the first step to the end of the second
    assert found == pytest.approx({**{kind: 2 * ms / total for kind, ms in SHARES.items()}, "idle": 30 / total})
    assert sum(found.values()) == pytest.approx(1)
    with_loops = Timeline(sorted(events(), key=lambda event: event.start), 2)
    assert with_loops.shares(categories(MODULE))["other"] > found["other"], "a loop would hide what is in it"


def test_gaps_are_found_where_they_are(line: Timeline) -> None:
    found = [(gap.before, gap.after, gap.between_steps, round(1e3 * gap.seconds, 6)) for gap in line.gaps()]
    # The gather ends last before the first gap, though the product began before it.
    within = ("all-gather.3", "softmax", False, 10.0)
    assert sorted(found) == sorted([within, within, ("update", "product", True, 10.0)])
    assert not timeline(events(1)[:3], 1, MODULE).gaps()


def test_steps_are_told_apart_by_what_runs_once() -> None:
    line = timeline(events(3), 3, MODULE)
    steps = line.steps()
    assert steps is not None and [(round(1e3 * a), round(1e3 * b)) for a, b in steps] == [(0, 90), (100, 190), (200, 290)]
    assert timeline(events(3), 2, MODULE).steps() is None
    assert {gap.between_steps for gap in timeline(events(3), 2, MODULE).gaps()} == {None}


def test_longest_operations_are_per_step(line: Timeline) -> None:
    assert line.longest(2) == [("product", pytest.approx(0.03), 1), ("all-gather.3", pytest.approx(0.03), 1)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
        ("cutlass_80_wmma_tensorop_bf16_s161616gemm", "matrix products"),
        ("gemm_fusion_dot_12", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("MemcpyD2D", "copies"),
        ("loop_multiply_fusion_3", "other"),
        ("input_reduce_fusion", "other"),
    ],
)
def test_kernels_of_a_gpu_are_known_by_name(name: str, kind: str) -> None:
    assert categories(None)(name) == kind and categories(MODULE)(name) == kind


def test_a_gap_in_words(line: Timeline) -> None:
    gap = next(gap for gap in line.gaps() if gap.between_steps)
    host = [Event("Execute", gap.start, gap.start + 0.006), Event("Execute", gap.start + 0.002, gap.start + 0.008)]
    host += [Event("brief", gap.start, gap.start + 0.0005), Event("before", gap.start - 1, gap.start)]
    assert meanwhile(gap, host) == [("Execute", pytest.approx(0.008))]
    text = in_words(gap, host, {"update": "update (adam)"})
    assert text == "10 ms between two steps, after update (adam), before product; the host was in Execute (80% of it)"
    assert in_words(gap, [], {}).endswith("before product; the trace has nothing of the host in it")


def test_all_gaps_in_words(line: Timeline) -> None:
    text = gaps_in_words(line, line.gaps())
    assert text.startswith(
        "No operation ran for 15.8% of the time (15 ms a step), in 3 gaps. Of that, 33% lies between steps, 67%"
    )
    assert text.endswith("3 of them last at least 0.1 ms, together 100% of the idle time; the longest takes 10 ms.")
    assert gaps_in_words(timeline(events(1)[:1], 1, MODULE), []) == "No gaps: in 1 steps some operation ran at every moment."


# Traces as JAX writes them


def proto(planes: Mapping[str, Mapping[str, Sequence[tuple[str, str | None, float, float]]]]) -> Any:
    """A profile: by plane and line (name, operation, start and end in ms)."""
    texts = []
    for plane, lines in planes.items():
        names = sorted({name for of_line in lines.values() for name, *_ in of_line})
        operations = sorted({op for of_line in lines.values() for _, op, *_ in of_line if op})
        meta = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }} ' for i, name in enumerate(names, 1))
        meta += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } '
        meta += "".join(f'stat_metadata {{ key: {i} value {{ id: {i} name: "{op}" }} }} ' for i, op in enumerate(operations, 2))
        shown = ""
        for at, (line, of_line) in enumerate(lines.items()):
            shown += f'lines {{ id: {at} name: "{line}" timestamp_ns: 1000000000 '
            for name, op, begin, end in of_line:
                stat = f"stats {{ metadata_id: 1 ref_value: {2 + operations.index(op)} }} " if op else ""
                duration = f"offset_ps: {round(begin * 1e9)} duration_ps: {round((end - begin) * 1e9)} "
                shown += f"events {{ metadata_id: {1 + names.index(name)} {duration}{stat}}} "
            shown += "} "
        texts.append(f'planes {{ name: "{plane}" {meta}{shown}}}')
    return jax.profiler.ProfileData.from_text_proto("\n".join(texts))


TWO_STEPS = [(name, name, begin + 100 * i, end + 100 * i) for i in range(2) for name, begin, end in STEP]
HOST = {"main": [("PjRt Execute", None, 90.0, 98.0)]}


@pytest.mark.parametrize(
    ("planes", "device"),
    [
        ({"/host:CPU": {"thread": TWO_STEPS, **HOST}}, "CPU"),
        (
            {
                "/device:GPU:0": {
                    "Stream #7(Compute)": [each for each in TWO_STEPS if "gather" not in each[0]],
                    "Stream #8(Compute)": [
                        ("ncclDevKernel_AllGather", op, *at) for name, op, *at in TWO_STEPS if "gather" in name
                    ],
                    "XLA Modules": [("jit_train_step", None, 0, 100)],
                },
                "/host:CPU": HOST,
            },
            "GPU:0",
        ),
        ({"/device:TPU:0": {"XLA Ops": TWO_STEPS, "Steps": [("0", None, 0, 100)]}, "/host:CPU": HOST}, "TPU:0"),
    ],
    ids=["CPU", "GPU", "TPU"],
)
def test_the_summary_of_a_trace(planes: Any, device: str) -> None:
    found = summary(read(proto(planes)), 2, MODULE)
    assert found["device"] == device
    assert found["step_seconds"] == pytest.approx(0.095)
    assert found["shares"] == pytest.approx({**{kind: ms / 95 for kind, ms in SHARES.items()}, "idle": 15 / 95})
    assert found["gaps"]["count"] == 3 and found["gaps"]["seconds"] == pytest.approx(0.03)
    assert {gap["between_steps"] for gap in found["gaps"]["longest"]} == {True, False}
    (between,) = (gap["words"] for gap in found["gaps"]["longest"] if gap["between_steps"])
    assert between.endswith("the host was in PjRt Execute (80% of it)")
    assert found["longest"][0]["from"] == "product (jvp()/mlp/dot_general)"


def test_devices_are_compared() -> None:
    later = [(name, op, begin + 50 * (begin >= 100), end + 50 * (begin >= 100)) for name, op, begin, end in TWO_STEPS]
    planes = {"/device:GPU:0": {"Stream #1": TWO_STEPS}, "/device:GPU:1": {"Stream #1": later}}
    found = summary(read(proto(planes)), 2, MODULE)
    assert found["idle_of_devices"] == pytest.approx([30 / 190, 80 / 240])


def test_a_trace_without_operations_fails() -> None:
    with pytest.raises(SectionFailed, match="no operation of a device"):
        summary(read(proto({"/host:CPU": HOST})), 2, MODULE)
