"""Seconds of one operation in HLO, and the mesh axes and bytes of a collective: what TPUs and GPUs share, and the costs of a TPU.

Compute on a TPU: from the compiler's cycle estimate or from the bytes that the operation moves. The estimate is close for matrix
products, but 1.2 to 4 times too high for what memory bandwidth bounds: plain elementwise operations take 0.2 to 0.8 of it. Hence
two costings. "cycles": the estimate for everything. "hybrid": for all but matrix products the estimate or the time for the bytes,
whichever is less. Operations without an estimate cost their bytes in both.

Collectives: bytes sent are those of `topology.sent_fraction`. The links of a TPU need (bytes sent) / (k x bandwidth of a torus
axis, both directions) plus a fixed latency, where k is the number of torus axes that the compiler uses at once, read
from its backend_config. A collective-permute makes one hop in one direction of one axis: k = 1/2.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mutransformer.planning.chips import Chip
from mutransformer.planning.compiled.hlo import Module, Op, ints
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.planning.topology import HBM_EFFICIENCY, sent_fraction

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
COLLECTIVES += ("collective-broadcast",)
LATENCY = 1e-6  # seconds
_SCALARS = 65536  # bytes: smaller bookkeeping is done in scalar memory, in parallel with everything else
_PRODUCTS = ("convolution", "dot")  # XLA:TPU turns matrix products into convolutions

Costing = Literal["cycles", "hybrid", "roofline"]  # the last of a GPU


class Cost(NamedTuple):
    """Cost of one compute operation."""

    seconds: float
    kind: str  # of `replay.COMPUTE`
    warning: str = ""


@dataclass(frozen=True)
class Collective:
    """A collective on one device."""

    kind: str
    axes: tuple[str, ...]  # mesh axes, in the mesh's order
    n: int  # devices in a group
    bytes: float  # of the full array
    wire_bytes: float  # that leave a device
    seconds: float  # for which its links are busy
    links: tuple[str, ...]  # that it keeps busy: one collective at a time uses each
    direction: str  # "+" or "-" for a permute on a torus, which needs one direction of a link; otherwise "+-"
    source: str  # op_name


def is_collective(op: Op) -> bool:
    """Whether the operation is a collective, or starts an asynchronous one."""
    return op.opcode.removesuffix("-start") in COLLECTIVES


@dataclass(frozen=True)
class CostModel(ABC):
    """Costs the operations of a module on a mesh of devices."""

    module: Module
    mesh: Mapping[str, int]  # sizes by axis, in the order in which devices are numbered
    kernels: KernelFlops

    @property
    @abstractmethod
    def bandwidth(self) -> float:
        """Bytes/s of main memory in practice."""

    @abstractmethod
    def compute(self, op: Op) -> Cost:
        """The cost of an operation that is neither a collective nor a transfer within the device."""

    @abstractmethod
    def collective(self, op: Op, outer: Op) -> Collective:
        """Reads a collective and the fusion or wrapper around it (or itself)."""

    def kernel(self, op: Op, by_bytes: float, peak_flops: float) -> Cost:
        """The cost of a kernel that XLA does not look into."""
        operands, results = ([a.shape for a in each] for each in (self.module.inputs(op), op.arrays))
        flops = self.kernels.of_call(op.source or op.name, operands, results, op.attrs)
        if flops is None:
            name = "/".join(op.source.split("/")[-2:]) or op.name
            return Cost(by_bytes, "kernel", f"kernel {name}: unknown, costed by its bytes; give its FLOPs with --kernel-flops")
        return Cost(max(flops / (self.kernels.efficiency * peak_flops), by_bytes), "kernel")

    def full_bytes(self, op: Op, kind: str) -> float:
        """Bytes of the full arrays of a collective, gathered or not yet reduced."""
        if kind != "all-gather":
            return sum(a.bytes for a in self.module.inputs(op))
        n = len(op.operands)
        # The start of a gather has its inputs and its outputs as results.
        return sum(a.bytes for a in (op.arrays[n : 2 * n] if op.opcode == "all-gather-start" else op.arrays))


@dataclass(frozen=True)
class TpuCosts(CostModel):
    """The costs of chips of a TPU slice."""

    chip: Chip
    costing: Costing

    @property
    def bandwidth(self) -> float:
        return self.chip.hbm_bandwidth * HBM_EFFICIENCY

    def compute(self, op: Op) -> Cost:
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
            if "tpu_custom_call" not in op.attrs:
                return Cost(0.0, "unestimated")  # an annotation for the compiler
            return self.kernel(op, by_bytes, self.chip.peak_flops)
        if "gather" in opcodes:
            return Cost(2 * written / self.bandwidth, "unestimated")
        return Cost(by_bytes if max(read, written) >= _SCALARS else 0.0, "unestimated")

    def collective(self, op: Op, outer: Op) -> Collective:
        kind = op.opcode.removesuffix("-start")
        if kind == "all-reduce" and outer.attr("calls").startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # such a fusion keeps a slice of the sum, and is executed as a reduce-scatter
        group = first_group(op.attrs, self.module.n_devices)
        full = self.full_bytes(op, kind)
        sent = full * sent_fraction(kind, len(group))
        permute = kind == "collective-permute"
        driven = 0.5 if permute else max(_axes_driven(op), _axes_driven(outer))
        seconds = sent / (driven * self.chip.ici_bandwidth) + LATENCY
        axes, direction = axes_of(group, self.mesh), _direction(op) if permute else "+-"
        links = tuple(axis + way for axis in axes for way in direction)
        return Collective(kind, axes, len(group), full, sent, seconds, links, direction, op.source or outer.source or op.name)


def _axes_driven(op: Op) -> float:
    """Torus axes that the compiler's algorithm uses at once: in an n-dimensional strategy those with several cores, else 1."""
    cores = op.find(r"cores:\{([\d ]+)\}") if "ND" in op.find(r'"strategy":"([^"]*)"') else ""
    return float(max(1, sum(int(n) > 1 for n in cores.split())))


def _direction(op: Op) -> str:
    """The direction in which most pairs of a permute send."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", op.find(r"source_target_pairs=\{(.*?\})\}"))
    up = sum(int(target) > int(source) for source, target in pairs)
    return "+" if 2 * up >= len(pairs) else "-"


def axes_of(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ. Devices are numbered along the mesh, the last axis fastest."""
    coordinates = np.unravel_index(group, tuple(mesh.values()))
    return tuple(axis for axis, along in zip(mesh, coordinates, strict=True) if len(set(along.tolist())) > 1) or ("self",)


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # 0, 1, 2, ... in an array of this shape, then transposed
_MESH = rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}"


def first_group(attrs: str, n_devices: int) -> list[int]:
    """The devices of the first group, in any form in which XLA writes groups; all devices if no group is written."""
    if found := re.search(r"(?:source_target_pairs|replica_groups)=\{\{([\d,]*)\}", attrs):
        return list(ints(found[1]))
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", attrs):
        return _iota(found[2], found[3])[: ints(found[1])[-1]].tolist()
    if found := re.search(_MESH, attrs):  # a mesh by names, the order of its devices, and the names of the axes in a group
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = _iota(found[2] or str(math.prod(sizes.values())), found[3]).reshape(tuple(sizes.values()))
        return ids[tuple(slice(None) if f"'{name}'" in found[4] else 0 for name in sizes)].ravel().tolist()
    return list(range(n_devices))


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    """Device ids in a row."""
    grid = np.arange(math.prod(ints(shape))).reshape(ints(shape))
    return grid.transpose(ints(permutation) if permutation else None).ravel()
