"""TPU chips as data, slices of them (`v5p:4x4x4` by chips, `v5p-128` as Google Cloud names them), and what their links carry."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mutransformer.errors import ConfigError
from mutransformer.planning.topology import Device, LinkUse, Topology, sent_fraction


@dataclass(frozen=True)
class Chip(Device):
    """Published figures of one chip, which JAX shows as one device (the two TensorCores of a v4 or v5p chip act as one)."""

    clock: float  # Hz at which the matrix units reach the published peak; XLA's cycle estimates refer to it
    ici_bandwidth: float  # bytes/s of one torus axis, both directions together
    pod: tuple[int, ...]  # chips along each torus axis of the largest slice
    ring_multiple: int  # an axis closes into a ring if its length is a multiple of this; on 3D tori all axes must meet it
    cores: int  # TensorCores per chip, which the number in Google's slice names counts


# From Google Cloud's page on each TPU version; clocks follow from peak / (2 x multipliers). ici_bandwidth is the payload share of
# the link rate (Austin et al., How to Scale Your Model, 2025, part 2), both directions.
_3D = {"ring_multiple": 4, "cores": 2}
_2D = {"pod": (16, 16), "ring_multiple": 16, "cores": 1}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 32e9, 1228e9, 1.05e9, 0.9e11, pod=(16, 16, 16), **_3D),
        Chip("v5e", "TPU v5 lite", 16e9, 819e9, 1.5e9, 0.9e11, **_2D),
        Chip("v5p", "TPU v5", 95e9, 2765e9, 1.75e9, 1.8e11, pod=(16, 20, 28), **_3D),
        Chip("v6e", "TPU v6 lite", 32e9, 1640e9, 1.75e9, 1.8e11, **_2D),
    )
}


@dataclass(frozen=True)
class Slice(Topology):
    """A box of chips."""

    chip: Chip
    shape: tuple[int, ...]

    noun: ClassVar[str] = "chip"
    compute_unit: ClassVar[str] = "MXU"

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def platform(self) -> str:
        return "tpu"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def n_cores(self) -> int:
        return self.chip.cores

    def links(self, kind: str, full: float, mesh: Mapping[str, int], axes: tuple[str, ...]) -> dict[str, LinkUse]:
        """Each mesh axis has links of its own."""
        sent = full * sent_fraction(kind, math.prod(mesh[axis] for axis in axes))
        use = LinkUse(sent, sent / (self.chip.ici_bandwidth * torus_rings(self, mesh, axes)))
        return {f"ICI {axis}": use for axis in axes}

    def larger(self) -> "Slice | None":
        return next((each for each in _slices(self.chip) if each.size >= 2 * self.size), None)

    def describe(self, unit: str) -> str:
        return f"sent per chip along {unit.removeprefix('ICI ')}"

    def figures(self) -> dict[str, float]:
        return super().figures() | {"clock": self.chip.clock, "ici_bandwidth_of_an_axis": self.chip.ici_bandwidth}

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each axis is a ring; otherwise it is a line."""
        closed = tuple(n % self.chip.ring_multiple == 0 for n in self.shape)
        return closed if len(closed) == 2 else (all(closed),) * len(closed)


def parse_slice(name: str) -> Slice:
    """The slice with a name: chips along each axis, `v5p:4x4x4`, or Google's, `v5p-128`, for the most compact box of that size.

    Raises ConfigError if there is no such slice. The name begins with a key of CHIPS.
    """
    kind = re.split("[:-]", name)[0]
    chip, slices = CHIPS[kind], _slices(CHIPS[kind])
    by_count = {f"{kind}-{each.size * chip.cores}": each for each in reversed(slices)}
    found = {**by_count, **{str(each): each for each in slices}}.get(name)
    if found is None:
        n_chips = math.prod(map(int, re.findall(r"\d+", name[len(kind) :]))) / (chip.cores if "-" in name else 1)
        nearest = sorted({each.size for each in slices}, key=lambda size: abs(size - n_chips))[:3]
        compact = (str(by_count[f"{kind}-{size * chip.cores}"]) for size in sorted(nearest))
        counts = "TensorCores, two per chip" if chip.cores == 2 else "chips"
        raise ConfigError(
            f"--topology {name}: {kind} has no such slice; the nearest are {', '.join(compact)}. Write chips along each of the "
            f"{len(chip.pod)} axes, as in {slices[-1]}, or Google's name, as in {kind}-{8 * chip.cores}, which counts {counts}"
        )
    return found


def _slices(chip: Chip) -> list[Slice]:
    """The slices on offer, for each size the box that Google's name stands for first: the most compact, axes ascending.

    A chip, or hosts of 2x2 chips side by side; on a 3D torus, 4x4x4 cubes from 64 chips on.
    """
    if len(chip.pod) == 2:
        boxes = [(1, 1), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8), (8, 4), (8, 8), (8, 16), (16, 8), (16, 16)]
    else:
        cubes = itertools.product(range(4, max(chip.pod) + 1, 4), repeat=3)
        fitting = [box for box in cubes if all(n <= limit for n, limit in zip(sorted(box), chip.pod, strict=True))]
        boxes = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *fitting]
    boxes.sort(key=lambda box: (math.prod(box), max(box), -min(box), list(box) != sorted(box)))
    return [Slice(chip, box) for box in boxes]


def torus_rings(topology: Slice, mesh: Mapping[str, int], axes: tuple[str, ...]) -> float:
    """How many rings of the torus can serve a collective over mesh axes at once; a line, or part of a ring, counts half.

    Mesh axes are laid on entire torus axes as far as their sizes allow, the last mesh axis first.
    """
    free = dict(enumerate(topology.shape))
    total = 0.0
    for axis in reversed(list(mesh)):
        chosen = _entire_axes(free, mesh[axis])
        covered = math.prod(free.pop(place) for place in chosen)
        if axis in axes:
            total += sum(1.0 if topology.rings[place] else 0.5 for place in chosen)
            total += 0.5 if covered < mesh[axis] else 0.0
    return total


def _entire_axes(free: dict[int, int], size: int) -> tuple[int, ...]:
    """The fewest torus axes longer than 1 whose product divides a size and is as large as possible."""
    places = [place for place, n in free.items() if n > 1]
    subsets = [chosen for count in range(len(places) + 1) for chosen in itertools.combinations(places, count)]
    dividing = [chosen for chosen in subsets if size % math.prod(free[place] for place in chosen) == 0]
    return max(dividing, key=lambda chosen: math.prod(free[place] for place in chosen))
