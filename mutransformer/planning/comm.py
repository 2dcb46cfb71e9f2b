"""Collectives as XLA writes them: over which axes of the mesh, how many bytes, and how long the links need for them.

For an array of V bytes, whole or not yet reduced, over n devices; W is the bandwidth of a torus axis, both directions, k the axes
that the compiler's algorithm drives at once, as it notes itself:

    all-gather, reduce-scatter, all-to-all   V (n - 1) / n / (k W)       collective-permute   V / (W / 2): one link, one hop
    all-reduce                             2 V (n - 1) / n / (k W)       and a fixed latency each
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mutransformer.planning.chips import Chip
from mutransformer.planning.hlo import Module, Op

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
LATENCY = 1e-6  # seconds


@dataclass(frozen=True)
class Collective:
    """Attributes:
    axes: of the mesh, in its order.
    n: devices in a group.
    bytes: of the whole array on a device.
    wire: that leave a device, or come to it.
    seconds: that its links are busy.
    direction: "+" or "-" for a permute, which needs only one direction of a link, else both: "+-".
    """

    kind: str
    axes: tuple[str, ...]
    n: int
    bytes: float
    wire: float
    seconds: float
    direction: str
    source: str

    @property
    def links(self) -> tuple[str, ...]:
        """Those it keeps busy: an axis and a direction each."""
        return tuple(axis + way for axis in self.axes for way in self.direction)


def is_collective(op: Op) -> bool:
    return op.opcode.removesuffix("-start") in KINDS


def read(module: Module, op: Op, outer: Op, mesh: Mapping[str, int], chip: Chip) -> Collective:
    """A collective, and the fusion or wrapper around it (or itself)."""
    kind = op.opcode.removesuffix("-start")
    if kind == "all-reduce" and outer.attr("calls").startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # the fusion keeps a slice of the sum, and is executed as one
    group = first_group(op.attrs, module.n_devices)
    n = len(group)
    if kind != "all-gather":
        whole = sum(a.bytes for a in module.inputs(op))
    else:
        whole = max(a.bytes for a in op.arrays) if op.opcode.endswith("-start") else op.bytes
    share = 1.0 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
    axes_driven = 0.5 if kind == "collective-permute" else max(_axes_driven(op), _axes_driven(outer))
    wire = whole * share
    return Collective(
        kind,
        axes_of(group, mesh),
        n,
        whole,
        wire,
        wire / (axes_driven * chip.ici_bandwidth) + LATENCY,
        _direction(op) if kind == "collective-permute" else "+-",
        op.source or outer.source or op.name,
    )


def _axes_driven(op: Op) -> float:
    """Torus axes that the compiler's algorithm uses at once: in an n-dimensional strategy those with several cores, else 1."""
    strategy = str(op.config.get("collective_algorithm_config", {}).get("strategy", ""))
    found = re.search(r"cores:\{([\d ]+)\}", op.attrs) if "ND" in strategy else None
    return float(max(1, sum(int(n) > 1 for n in found[1].split()))) if found else 1.0


def _direction(op: Op) -> str:
    pairs = re.findall(r"\{(\d+),(\d+)\}", op.attrs.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
    up = sum(int(target) > int(source) for source, target in pairs)
    return "+" if 2 * up >= len(pairs) else "-"


def axes_of(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ: they are numbered along the mesh, the last axis fastest."""
    stride, found = math.prod(mesh.values()), []
    for axis, size in mesh.items():
        stride //= size
        if len({device // stride % size for device in group}) > 1:
            found.append(axis)
    return tuple(found) or ("self",)


def first_group(attrs: str, n_devices: int) -> list[int]:
    """The devices of the first group, in any of the forms in which XLA writes groups."""
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attrs):
        return [int(found[1]), int(found[2])]
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attrs):
        return _ints(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attrs):
        return _iota(_ints(found[2]), found[3])[: _ints(found[1])[-1]]
    form = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    if found := re.search(form, attrs):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = _iota(_ints(found[2]), found[3]) if found[2] else list(range(math.prod(sizes.values())))
        used, group, stride = re.findall(r"'([^']+)'", found[4]), [0], math.prod(sizes.values())
        for name, size in sizes.items():
            stride //= size
            if name in used:
                group = [place + stride * i for place in group for i in range(size)]
        return [ids[place] for place in group]
    return list(range(n_devices))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(dims: list[int], permutation: str | None) -> list[int]:
    """0 ... prod(dims) - 1 as an array of these dims, transposed, in one row."""
    order = _ints(permutation) if permutation else list(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    row = [0]
    for i in order:
        row = [place + strides[i] * k for place in row for k in range(dims[i])]
    return row
