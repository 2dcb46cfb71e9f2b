"""The simulated step: schedules and totals of a compiled step under both costings."""

from dataclasses import dataclass

from mutransformer.model.weights import attention_flops_per_token
from mutransformer.planning.compiled import hlo
from mutransformer.planning.compiled.compiler import CompiledStep
from mutransformer.planning.compiled.op_cost import Costing, CostModel
from mutransformer.planning.compiled.replay import Replay
from mutransformer.planning.compiled.schedule import Schedule, Totals, totals
from mutransformer.planning.estimate.bounds import input_bytes
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.scenario import Scenario

COSTINGS: tuple[Costing, ...] = ("hybrid", "cycles")  # the first is the one to quote
ACCURACY = (
    "Simulated from the schedule of the TPU compiler, not measured on hardware. Expect +-15 % where compute bounds the step, "
    "+-30 % or worse where communication is exposed; differences under 5 % are not significant. Pallas kernels are costed at an "
    "assumed fraction of peak."
)


@dataclass(frozen=True)
class Simulated:
    """A compiled step in time.

    Attributes:
        schedules, totals: by costing.
        memory: bytes on a device by category. padding: what the step's arguments take beyond their elements.
        peak_bytes: peak memory of a device, without code, which the compiler counts separately.
        compile_seconds: time that the compiler took.
    """

    scenario: Scenario
    schedules: dict[Costing, Schedule]
    totals: dict[Costing, Totals]
    memory: dict[str, float]
    peak_bytes: float
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of a step, by the costing to quote."""
        return self.totals[COSTINGS[0]].seconds

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.scenario.topology.chip.hbm_bytes

    def mfu(self, costing: Costing, flops: float) -> float:
        """Model FLOP/s as a fraction of peak, for model FLOPs of a step on a device."""
        return flops / (self.totals[costing].seconds * self.scenario.topology.chip.peak_flops)


def simulate(scenario: Scenario, compiled: CompiledStep, kernels: KernelFlops) -> Simulated:
    """Replays a compiled step under both costings."""
    module = hlo.parse(compiled.text)
    schedules: dict[Costing, Schedule] = {}
    for costing in COSTINGS:
        costs = CostModel(module, scenario.topology.chip, costing, kernels)
        schedules[costing] = Replay(module, costs, scenario.mesh_sizes).step()
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
