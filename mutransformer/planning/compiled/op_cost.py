"""Seconds of one compute operation, from the compiler's cycle estimate or from the bytes that it moves.

The cycle estimate is close for matrix products, but 1.2 to 4 times too high for what memory bandwidth bounds: plain elementwise
operations take 0.2 to 0.8 of it. Hence two costings. "cycles": the estimate for everything. "hybrid": for all but matrix products
the estimate or the time for the bytes, whichever is less. Operations without an estimate cost their bytes in both.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mutransformer.planning.chips import Chip
from mutransformer.planning.compiled.hlo import Module, Op
from mutransformer.planning.kernel_flops import KernelFlops

Costing = Literal["cycles", "hybrid"]

HBM_EFFICIENCY = 0.85  # the fraction of the published bandwidth that a plain loop over memory reaches
_SCALARS = 65536  # bytes: smaller bookkeeping is done in scalar memory, in parallel with everything else
_PRODUCTS = ("convolution", "dot")  # XLA:TPU turns matrix products into convolutions


class Cost(NamedTuple):
    """Cost of one operation. kind: of `schedule.COMPUTE`; warning: empty if there is none."""

    seconds: float
    kind: str
    warning: str = ""


@dataclass(frozen=True)
class CostModel:
    """Costs the operations of a module on a chip."""

    module: Module
    chip: Chip
    costing: Costing
    kernels: KernelFlops

    @property
    def bandwidth(self) -> float:
        """Bytes/s of main memory in practice."""
        return self.chip.hbm_bandwidth * HBM_EFFICIENCY

    def cost(self, op: Op) -> Cost:
        """The cost of an operation that is neither a collective nor a transfer within the chip."""
        opcodes = {op.opcode, *(inner.opcode for inner in self.module.nested(op))}
        read = sum(a.bytes for a in self.module.inputs(op) if a.in_hbm)
        written = sum(a.bytes for a in op.arrays if a.in_hbm)
        by_bytes = (read + written) / self.bandwidth
        if op.cycles is not None:
            seconds = op.cycles / self.chip.clock
            if opcodes.intersection(_PRODUCTS):
                return Cost(seconds, "matmul")
            return Cost(min(seconds, by_bytes) if self.costing == "hybrid" else seconds, "other")
        if op.opcode == "custom-call":
            return self._kernel_cost(op, by_bytes)
        if "gather" in opcodes:
            return Cost(2 * written / self.bandwidth, "unestimated")
        return Cost(by_bytes if max(read, written) >= _SCALARS else 0.0, "unestimated")

    def _kernel_cost(self, op: Op, by_bytes: float) -> Cost:
        if "tpu_custom_call" not in op.attrs:
            return Cost(0.0, "unestimated")  # an annotation for the compiler
        operands, results = ([a.shape for a in each] for each in (self.module.inputs(op), op.arrays))
        flops = self.kernels.of_call(op.source or op.name, operands, results, op.attrs)
        if flops is None:
            name = "/".join(op.source.split("/")[-2:]) or op.name
            return Cost(by_bytes, "kernel", f"kernel {name}: unknown, costed by its bytes; give its FLOPs with --kernel-flops")
        return Cost(max(flops / (self.kernels.efficiency * self.chip.peak_flops), by_bytes), "kernel")
