"""The simulated step: a schedule of the real compiler, replayed in time under each costing of the devices."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mutransformer.model.weights import attention_flops_per_token
from mutransformer.planning.cards import Cluster
from mutransformer.planning.chips import Slice
from mutransformer.planning.compiled.compilers import CompiledStep
from mutransformer.planning.compiled.cost_model import Collective, Costing, CostModel, TpuCosts
from mutransformer.planning.compiled.gpu_costs import LINK_EFFICIENCY, MATMUL_EFFICIENCY, GpuCosts
from mutransformer.planning.compiled.hlo import Module, parse
from mutransformer.planning.compiled.replay import COMPUTE, WAITS, Loop, Schedule, replay
from mutransformer.planning.estimate.bounds import Scenario, input_bytes
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.topology import HBM_EFFICIENCY

COSTINGS: tuple[Costing, ...] = ("hybrid", "cycles")  # of TPUs; the first is the one to quote
_TRUST = (
    "Expect +-15 % where compute bounds the step, +-30 % or worse where communication is exposed; differences under 5 % are not "
    "significant. Kernels are costed at an assumed fraction of peak."
)
TPU_ACCURACY = f"Simulated from the schedule of the TPU compiler, not measured on hardware. {_TRUST}"
GPU_ACCURACY = (
    "Simulated from the schedule of XLA:GPU, not measured on hardware, by a roofline: products at "
    f"{MATMUL_EFFICIENCY:.0%} of peak, memory at {HBM_EFFICIENCY:.0%}, NVLink and network at {LINK_EFFICIENCY:.0%} of their "
    f"published bandwidth. {_TRUST}"
)


class CollectiveKey(NamedTuple):
    """What collectives are grouped by in the totals; n: devices in a group."""

    kind: str
    axes: tuple[str, ...]
    n: int
    is_async: bool


@dataclass
class CollectiveTotals:
    """Sums over the collectives of one key in a step."""

    count: float = 0.0
    bytes: float = 0.0
    wire_bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass(frozen=True)
class Totals:
    """Sums over a step on one device."""

    seconds: float
    by_kind: dict[str, float]  # seconds of spans
    collectives: dict[CollectiveKey, CollectiveTotals]  # the slowest first
    costliest: dict[tuple[str, str], float]  # seconds by kind and op_name, most first
    warnings: list[str]
    compute_seconds: float
    communication_seconds: float  # collectives, exposed or hidden
    exposed_seconds: float  # for which the core waits for collectives


def totals(schedule: Schedule) -> Totals:
    """The totals of a step's schedule."""
    by_kind: dict[str, float] = dict.fromkeys((*COMPUTE, *WAITS, "transfer"), 0.0)
    by_source: defaultdict[tuple[str, str], float] = defaultdict(float)
    collectives: defaultdict[CollectiveKey, CollectiveTotals] = defaultdict(CollectiveTotals)
    warnings: set[str] = set()
    for each, times in schedule.flat():
        warnings |= each.warnings
        for span in each.spans:
            by_kind[span.kind] += times * span.seconds
            by_source[span.kind, span.label] += times * span.seconds
        for c, _, is_async, exposed, *_ in each.transfers:
            sums = collectives[CollectiveKey(c.kind, c.axes, c.n, is_async)]
            sums.count += times
            sums.bytes += times * c.bytes
            sums.wire_bytes += times * c.wire_bytes
            sums.seconds += times * c.seconds
            sums.exposed_seconds += times * exposed
    return Totals(
        schedule.seconds,
        by_kind,
        dict(sorted(collectives.items(), key=lambda item: -item[1].seconds)),
        {key: seconds for key, seconds in sorted(by_source.items(), key=lambda item: -item[1]) if seconds},
        sorted(warnings),
        compute_seconds=sum(by_kind[kind] for kind in COMPUTE),
        communication_seconds=sum((sums.seconds for sums in collectives.values()), 0.0),
        exposed_seconds=sum((sums.exposed_seconds for sums in collectives.values()), 0.0),
    )


class Overlap(NamedTuple):
    """A collective where it stands in the program, and what the core computes between its start and where it is waited for."""

    where: str  # forward, backward or another loop; or the step, outside of the loops
    times: int  # that it runs in a step
    collective: Collective
    exposed_seconds: float  # of one run
    beside: Mapping[str, int]  # operations by kind; empty if it is waited for at once
    beside_seconds: float


def overlaps(schedule: Schedule, where: str = "step", times: int = 1) -> Iterator[Overlap]:
    """Every collective of a schedule and of the loops in it."""
    for each in schedule.transfers:
        yield Overlap(where, times, each.collective, each.exposed, each.beside, each.beside_seconds)
    for loop in schedule.loops:
        yield from overlaps(loop.body, loop_name(loop) if loop.n > 1 else where, times * loop.n)


def loop_name(loop: Loop) -> str:
    """Which loop it is, by the name of the operation that it comes from."""
    return "backward" if "transpose" in loop.label else "forward" if "jvp" in loop.label else "loop"


@dataclass(frozen=True)
class Simulated:
    """A compiled step in time."""

    scenario: Scenario
    schedules: dict[Costing, Schedule]
    totals: dict[Costing, Totals]
    memory: dict[str, float]  # bytes on a device by category; padding: what the step's arguments take beyond their elements
    peak_bytes: float  # of a device, without code, which the compiler counts separately
    compile_seconds: float

    @property
    def quoted(self) -> Costing:
        """The costing to quote."""
        return next(iter(self.schedules))

    @property
    def overlaps(self) -> list[Overlap]:
        """Every collective of the program, by the costing to quote."""
        return list(overlaps(self.schedules[self.quoted]))

    @property
    def seconds(self) -> float:
        """Seconds of a step, by the costing to quote."""
        return self.totals[self.quoted].seconds

    @property
    def accuracy(self) -> str:
        """How far to trust the seconds, in a sentence."""
        return GPU_ACCURACY if isinstance(self.scenario.topology, Cluster) else TPU_ACCURACY

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.scenario.topology.chip.hbm_bytes

    def mfu(self, costing: Costing) -> dict[str, float]:
        """Model FLOP/s as a fraction of peak, by the conventions of `model_flops`."""
        attainable = self.totals[costing].seconds * self.scenario.topology.chip.peak_flops
        return {name: flops / attainable for name, flops in model_flops(self.scenario).items()}


def cost_models(scenario: Scenario, module: Module, kernels: KernelFlops) -> dict[Costing, CostModel]:
    """The ways to cost a module on the devices of a scenario, the one to quote first."""
    topology, mesh = scenario.topology, scenario.mesh_sizes
    if isinstance(topology, Cluster):
        return {"roofline": GpuCosts(module, mesh, kernels, topology)}
    assert isinstance(topology, Slice)
    return {costing: TpuCosts(module, mesh, kernels, topology.chip, costing) for costing in COSTINGS}


def simulate(scenario: Scenario, compiled: CompiledStep, kernels: KernelFlops) -> Simulated:
    """Replays a compiled step under each costing."""
    models = cost_models(scenario, parse(compiled.text), kernels)
    schedules: dict[Costing, Schedule] = {costing: replay(model) for costing, model in models.items()}
    sums: dict[Costing, Totals] = {costing: totals(schedule) for costing, schedule in schedules.items()}
    inputs, sizes = input_bytes(scenario), dict(compiled.memory)
    peak = sum(size for category, size in sizes.items() if category != "code")
    memory = inputs | {"padding": sizes.pop("arguments") - sum(inputs.values())} | sizes
    return Simulated(scenario, schedules, sums, memory, peak, compiled.seconds)


def model_flops(scenario: Scenario) -> dict[str, float]:
    """Model FLOPs of a step on a device, by convention.

    mfu: this project's, `flops_per_token`. mfu_6n: 6 for every parameter, the embedding included, and attention over all
    positions: the convention of published figures of other programs.
    """
    c = scenario.config
    all_weights = 6.0 * scenario.program.n_params + attention_flops_per_token(c.model, c.data.seq_len)
    per_token = {"mfu": scenario.program.flops_per_token, "mfu_6n": all_weights}
    return {name: flops * c.tokens_per_step / scenario.topology.size for name, flops in per_token.items()}
