"""TPU chips as data, and names of slices of them: `v5p:4x4x4` by chips, `v5p-128` as Google Cloud names them."""

import itertools
import math
import re
from dataclasses import dataclass

from mutransformer.errors import ConfigError, check
from mutransformer.sharding.devices import peak_flops


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip, which JAX shows as one device (the two TensorCores of a v4 or v5p chip act as one).

    Attributes:
        device_kind: JAX's name for it.
        clock: Hz at which the matrix units reach the published peak. XLA's cycle estimates refer to it.
        hbm_bytes, hbm_bandwidth: main memory, bytes and bytes/s.
        ici_bandwidth: bytes/s of one torus axis, both directions together.
        pod: chips along each torus axis of the largest slice.
        ring_multiple: an axis closes into a ring if its length is a multiple of this; on 3D tori all axes must meet it.
        cores: TensorCores per chip.
        names_count_cores: whether the number in Google's slice names counts TensorCores instead of chips.
    """

    name: str
    device_kind: str
    clock: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    pod: tuple[int, ...]
    ring_multiple: int
    cores: int
    names_count_cores: bool

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_flops(self.device_kind)
        assert peak is not None, self.device_kind
        return peak


# From Google Cloud's page on each TPU version; clocks follow from peak / (2 x multipliers). ici_bandwidth is the payload share of
# the link rate (Austin et al., How to Scale Your Model, 2025, part 2), both directions.
_3D = {"ring_multiple": 4, "cores": 2, "names_count_cores": True}
_2D = {"pod": (16, 16), "ring_multiple": 16, "cores": 1, "names_count_cores": False}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 1.05e9, 32e9, 1228e9, 0.9e11, pod=(16, 16, 16), **_3D),
        Chip("v5e", "TPU v5 lite", 1.5e9, 16e9, 819e9, 0.9e11, **_2D),
        Chip("v5p", "TPU v5", 1.75e9, 95e9, 2765e9, 1.8e11, pod=(16, 20, 28), **_3D),
        Chip("v6e", "TPU v6 lite", 1.75e9, 32e9, 1640e9, 1.8e11, **_2D),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice: a box of chips."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each axis is a ring; otherwise it is a line."""
        closed = tuple(n % self.chip.ring_multiple == 0 for n in self.shape)
        return closed if len(closed) == 2 else (all(closed),) * len(closed)


def parse_topology(name: str) -> Topology:
    """The slice with a name: chips along each axis, `v5p:4x4x4`, or Google's, `v5p-128`, for the most compact box of that size.

    Raises:
        ConfigError: no such chip, or no such slice of it.
    """
    kind = re.split("[:-]", name)[0]
    measure = "(to measure a GPU or CPU that you have, use scripts/benchmark.py)"
    check(kind in CHIPS, f"--topology {name}: no such chip; known chips are {', '.join(CHIPS)} {measure}")
    chip, slices = CHIPS[kind], _slices(CHIPS[kind])
    per_chip = chip.cores if chip.names_count_cores else 1
    by_count = {f"{kind}-{each.size * per_chip}": each for each in reversed(slices)}
    found = {**by_count, **{str(each): each for each in slices}}.get(name)
    if found is None:
        n_chips = math.prod(map(int, re.findall(r"\d+", name[len(kind) :]))) / (per_chip if "-" in name else 1)
        nearest = sorted({each.size for each in slices}, key=lambda size: abs(size - n_chips))[:3]
        compact = (str(by_count[f"{kind}-{size * per_chip}"]) for size in sorted(nearest))
        counts = "TensorCores, two per chip" if chip.names_count_cores else "chips"
        raise ConfigError(
            f"--topology {name}: {kind} has no such slice; the nearest are {', '.join(compact)}. Write chips along each of the "
            f"{len(chip.pod)} axes, as in {slices[-1]}, or Google's name, as in {kind}-{8 * per_chip}, which counts {counts}"
        )
    return found


def _slices(chip: Chip) -> list[Topology]:
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
    return [Topology(chip, box) for box in boxes]
