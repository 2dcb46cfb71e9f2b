"""Seconds of one operation of a GPU's schedule, by a roofline: FLOPs or bytes, at stated fractions of the published peak.

XLA:GPU writes no estimates into its schedule, and without a GPU it chooses the tiles of products blindly: on a GPU it times them.
So a product is costed by its FLOPs and bytes alone. Not modeled: multiprocessors and memory bandwidth that NCCL takes from what
runs beside it; clocks that fall under load.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mutransformer.planning.cards import NETWORK, Cluster
from mutransformer.planning.compiled.cost_model import Collective, Cost, CostModel, axes_of, first_group
from mutransformer.planning.compiled.hlo import Op
from mutransformer.planning.topology import HBM_EFFICIENCY, sent_fraction

MATMUL_EFFICIENCY = 0.7  # of peak, of a product chosen by autotuning
LINK_EFFICIENCY = 0.8  # of NVLink's and the network's published bandwidth that NCCL reaches with large arrays
NVLINK_LATENCY, NETWORK_LATENCY = 15e-6, 40e-6  # seconds of a collective, however small
LAUNCH = 2e-6  # seconds of a kernel, however small
_COPIES = {"bitcast", "copy", "convert", "reshape", "transpose"}  # what XLA may put between a slice and the array that it is of


@dataclass(frozen=True)
class GpuCosts(CostModel):
    """The costs of GPUs."""

    cluster: Cluster

    @property
    def bandwidth(self) -> float:
        return self.cluster.chip.hbm_bandwidth * HBM_EFFICIENCY

    def compute(self, op: Op) -> Cost:
        by_bytes = self._touched(op) / self.bandwidth
        if op.opcode == "custom-call" and "fmha" in op.attrs:
            return self.kernel(op, by_bytes, self.cluster.chip.peak_flops)
        products = list(self._products(op))
        if products:
            by_flops = sum(products) / (MATMUL_EFFICIENCY * self.cluster.chip.peak_flops)
            return Cost(max(LAUNCH, by_flops, by_bytes), "matmul")
        if op.opcode == "custom-call" and not re.search(r"cub|sort|topk|TopK", op.attrs):
            return self.kernel(op, by_bytes, self.cluster.chip.peak_flops)
        return Cost(max(LAUNCH, by_bytes), "other")

    def collective(self, op: Op, outer: Op) -> Collective:
        """All collectives share a queue: XLA runs them one after the other, on a stream beside that of the kernels."""
        kind = op.opcode.removesuffix("-start")
        group = first_group(op.attrs, self.module.n_devices)
        full, axes = self.full_bytes(op, kind), axes_of(group, self.mesh)
        source = op.source or outer.source or op.name
        if axes == ("self",):
            return Collective(kind, axes, 1, full, 0.0, 0.0, ("stream",), "+-", source)
        uses = self.cluster.links(kind, full, self.mesh, axes)
        latency = NETWORK_LATENCY if NETWORK in uses else NVLINK_LATENCY
        seconds = max(use.seconds for use in uses.values()) / LINK_EFFICIENCY + latency
        sent = full * sent_fraction(kind, len(group))
        return Collective(kind, axes, len(group), full, sent, seconds, ("stream",), "+-", source)

    def _products(self, op: Op) -> Iterator[float]:
        """FLOPs of each matrix product in an operation; those of float32 factors count twice, as TF32 has half of the peak."""
        for each in (op, *self.module.nested(op)):
            if each.opcode == "dot":
                contracted = each.find(r"lhs_contracting_dims=\{([\d,]*)\}").split(",")
            elif each.opcode == "custom-call" and "cublas" in each.attrs:
                contracted = re.findall(r"\d+", each.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]'))
            else:
                continue
            left = self.module.inputs(each)[0]
            depth = math.prod(left.shape[int(i)] for i in contracted if i)
            wide = 2 if left.bytes == 4 * math.prod(left.shape) else 1
            yield wide * 2.0 * math.prod(each.arrays[0].shape) * depth

    def _touched(self, op: Op) -> float:
        """Bytes of memory that an operation reads and writes. Of an array that is sliced or updated in part: of that part."""
        body = self.module.called(op) if op.opcode == "fusion" else []
        if not body:
            if op.opcode in ("dynamic-slice", "slice", "gather"):
                return 2 * sum(a.bytes for a in op.arrays)
            if op.opcode in ("dynamic-update-slice", "scatter"):
                return 2 * sum(a.bytes for a in self.module.inputs(op)[1:])
            return sum(a.bytes for a in (*self.module.inputs(op), *op.arrays))
        users: dict[str, list[Op]] = {}
        for each in body:
            for name in each.operands:
                users.setdefault(name, []).append(each)
        read = sum(self._read(each, users) for each in body if each.opcode == "parameter")
        root = next(each for each in body if each.is_root)
        results = [self.module.ops[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return read + sum(self._written(each) for each in results)

    def _read(self, value: Op, users: dict[str, list[Op]]) -> float:
        """Bytes read of a value inside a fusion."""
        whole, read = sum(a.bytes for a in value.arrays), 0.0
        for user in users.get(value.name, []):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
                read += sum(a.bytes for a in user.arrays)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == value.name:
                continue  # updated in place
            elif user.opcode in _COPIES:
                read += self._read(user, users)
            else:
                return whole
        return min(read, whole)

    def _written(self, value: Op) -> float:
        """Bytes written of a result of a fusion."""
        while value.opcode in _COPIES and value.operands:
            source = self.module.ops[value.operands[0]]
            if source.opcode not in (*_COPIES, "dynamic-update-slice", "scatter"):
                break
            value = source
        if value.opcode in ("dynamic-update-slice", "scatter"):
            return sum(a.bytes for a in self.module.ops[value.operands[-1 if value.opcode == "scatter" else 1]].arrays)
        return sum(a.bytes for a in value.arrays)
