"""Collectives in HLO: the mesh axes that they run over, their bytes, and how long they keep the links busy.

Bytes sent are those of `chips.sent_fraction`. The links need (bytes sent) / (k x bandwidth of a torus axis, both
directions) plus a fixed latency, where k is the number of torus axes that the compiler's algorithm drives at once, read from its
backend_config. A collective-permute makes one hop in one direction of one axis: k = 1/2.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mutransformer.planning.chips import Chip, sent_fraction
from mutransformer.planning.compiled.hlo import Module, Op, ints

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
KINDS += ("collective-broadcast",)
LATENCY = 1e-6  # seconds


@dataclass(frozen=True)
class Collective:
    """A collective on one device.

    Attributes:
        axes: mesh axes, in the mesh's order.
        n: devices in a group.
        bytes, wire_bytes: of the full array, and those that leave a device.
        seconds: for which its links are busy.
        direction: "+" or "-" for a permute, which needs one direction of a link; otherwise "+-".
        source: op_name.
    """

    kind: str
    axes: tuple[str, ...]
    n: int
    bytes: float
    wire_bytes: float
    seconds: float
    direction: str
    source: str

    @property
    def links(self) -> tuple[str, ...]:
        """The links that it keeps busy, each an axis and a direction."""
        return tuple(axis + way for axis in self.axes for way in self.direction)


def is_collective(op: Op) -> bool:
    """Whether the operation is a collective, or starts an asynchronous one."""
    return op.opcode.removesuffix("-start") in KINDS


def read_collective(module: Module, op: Op, outer: Op, mesh: Mapping[str, int], chip: Chip) -> Collective:
    """Reads a collective and the fusion or wrapper around it (or itself). mesh: sizes by axis, in the order of device numbers."""
    kind = op.opcode.removesuffix("-start")
    if kind == "all-reduce" and outer.attr("calls").startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # such a fusion keeps a slice of the sum, and is executed as a reduce-scatter
    group = first_group(op.attrs, module.n_devices)
    if kind != "all-gather":
        full = sum(a.bytes for a in module.inputs(op))
    else:
        full = max(a.bytes for a in op.arrays) if op.opcode.endswith("-start") else op.bytes
    sent = full * sent_fraction(kind, len(group))
    permute = kind == "collective-permute"
    driven = 0.5 if permute else max(_axes_driven(op), _axes_driven(outer))
    seconds = sent / (driven * chip.ici_bandwidth) + LATENCY
    axes, direction = axes_of(group, mesh), _direction(op) if permute else "+-"
    return Collective(kind, axes, len(group), full, sent, seconds, direction, op.source or outer.source or op.name)


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
