"""What one compute operation costs, from the compiler's estimate of cycles, or from bytes where that is nearer the truth.

The compiler's cycles are close for matrix products, and too many by 1.2 to 4 times for what the memory's bandwidth bounds: plain
elementwise operations come out at 0.2 to 0.8 of it. Hence two costings. cycles: its estimate for all. hybrid: for all but matrix
products the estimate, or the time for the bytes if that is less. Operations without an estimate cost their bytes in both.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mutransformer.planning.chips import Chip
from mutransformer.planning.hlo import Module, Op
from mutransformer.planning.kernels import Kernels

Costing = Literal["cycles", "hybrid"]
Kind = Literal["matmul", "kernel", "other", "unestimated"]

HBM_EFFICIENCY = 0.85  # of the published bandwidth, what a plain loop over memory gets
_SCALARS = 65536  # bytes: bookkeeping of less is done in scalar memory, beside everything else
_PRODUCTS = ("convolution", "dot")  # XLA:TPU turns matrix products into convolutions


class Cost(NamedTuple):
    """warning: empty if there is none."""

    seconds: float
    kind: Kind
    warning: str = ""


@dataclass(frozen=True)
class Timer:
    """Costs the operations of a module on a chip."""

    module: Module
    chip: Chip
    costing: Costing
    kernels: Kernels

    @property
    def bandwidth(self) -> float:
        return self.chip.hbm_bandwidth * HBM_EFFICIENCY

    def cost(self, op: Op) -> Cost:
        """Of any operation that is neither a collective nor a transfer within the chip."""
        opcodes = {op.opcode, *(inner.opcode for inner in self.module.within(op))}
        taken = sum(a.bytes for a in self.module.inputs(op) if a.in_hbm)
        given = sum(a.bytes for a in op.arrays if a.in_hbm)
        by_bytes = (taken + given) / self.bandwidth
        if op.cycles is not None:
            seconds = op.cycles / self.chip.clock
            if opcodes.intersection(_PRODUCTS):
                return Cost(seconds, "matmul")
            return Cost(min(seconds, by_bytes) if self.costing == "hybrid" else seconds, "other")
        if op.opcode == "custom-call":
            return self._kernel(op, by_bytes)
        if "gather" in opcodes:
            return Cost(2 * given / self.bandwidth, "unestimated")
        return Cost(by_bytes if max(taken, given) >= _SCALARS else 0.0, "unestimated")

    def _kernel(self, op: Op, by_bytes: float) -> Cost:
        if "tpu_custom_call" not in op.attrs:
            return Cost(0.0, "unestimated")  # a mark for the compiler
        operands, results = ([a.shape for a in each] for each in (self.module.inputs(op), op.arrays))
        flops = self.kernels.flops_of(op.source or op.name, operands, results, op.attrs)
        if flops is None:
            name = "/".join(op.source.split("/")[-2:]) or op.name
            return Cost(by_bytes, "kernel", f"kernel {name}: unknown, costed at its bytes; tell its FLOPs with --kernel-flops")
        return Cost(max(flops / (self.kernels.efficiency * self.chip.peak_flops), by_bytes), "kernel")
