"""A compiled step in time: its schedule under both costings, and what of it can be told in numbers."""

from dataclasses import dataclass

import jax

from mutransformer.model.transformer import specs
from mutransformer.planning import hlo
from mutransformer.planning.case import Case
from mutransformer.planning.estimate import Estimate, held
from mutransformer.planning.kernels import Kernels
from mutransformer.planning.lower import Compiled
from mutransformer.planning.timing import Costing, Timer
from mutransformer.planning.walk import Schedule, Totals, Walk, totals

COSTINGS: tuple[Costing, ...] = ("hybrid", "cycles")  # the first is the one to quote


@dataclass(frozen=True)
class Simulated:
    """schedules, totals: by costing."""

    case: Case
    compiled: Compiled
    schedules: dict[Costing, Schedule]
    totals: dict[Costing, Totals]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.totals[COSTINGS[0]].seconds

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on a device. padding: what arguments take beyond their elements."""
        c, given = self.compiled, held(self.case)
        padding = c.arguments - sum(given.values())
        return given | {"padding": padding, "outputs": c.outputs, "temporaries": c.temporaries, "code": c.code}

    @property
    def peak(self) -> float:
        """Bytes on a device at most, code left out: the compiler counts it apart."""
        return self.compiled.arguments + self.compiled.outputs + self.compiled.temporaries

    @property
    def fits(self) -> bool:
        return self.peak <= self.case.topology.chip.hbm_bytes

    def mfu(self, costing: Costing, flops: float) -> float:
        """Model FLOP/s over the peak.

        Args:
            costing: of the step.
            flops: of a step on a device, by any convention.
        """
        return flops / (self.totals[costing].seconds * self.case.topology.chip.peak_flops)


def simulate(case: Case, compiled: Compiled, kernels: Kernels) -> Simulated:
    """Walks through the compiled step."""
    module = hlo.parse(compiled.text)
    walks: dict[Costing, Schedule] = {
        costing: Walk(module, Timer(module, case.topology.chip, costing, kernels), case.sizes).step() for costing in COSTINGS
    }
    sums: dict[Costing, Totals] = {costing: totals(schedule) for costing, schedule in walks.items()}
    return Simulated(case, compiled, walks, sums)


def flops_by_convention(estimate: Estimate) -> dict[str, float]:
    """Model FLOPs of a step on a device, by who counts: `mfu` as this project does; `mfu_6n` 6 for each parameter, the embedding
    too, and attention over all positions: as other programs were measured that are compared with."""
    case, c = estimate.case, estimate.case.config
    n = sum(w.size for w in jax.tree.leaves(specs(c)))
    attention = 12 * c.model.n_layer * c.model.n_head * c.model.d_head * c.data.seq_len
    return {
        "mfu": estimate.flops["model"],
        "mfu_6n": (6.0 * n + attention) * c.tokens_per_step / case.topology.size,
    }
