"""TPU chips as data, and names of slices of them: `v5p:4x4x4` by chips, `v5p-128` as Google Cloud sells it."""

import math
import re
from dataclasses import dataclass

from mutransformer.errors import ConfigError, check
from mutransformer.sharding.devices import peak_flops


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip, which is one JAX device for all kinds here (v4, v5p: two cores that work as one).

    Attributes:
        kind: JAX's name of it.
        clock: Hz at which the matrix units give that peak: XLA's cycles are counted in it.
        hbm_bytes: of main memory.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s of one axis of the torus, both directions together.
        pod: the largest slice, chips along each axis of the torus.
        side: multiples of chips along an axis whose ends are joined: 4 for v4 and v5p, where all axes must have it, else 16.
        cores: TensorCores.
        names_cores: whether the number in Google's name counts TensorCores; else chips.
    """

    name: str
    kind: str
    clock: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    pod: tuple[int, ...]
    side: int
    cores: int
    names_cores: bool

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_flops(self.kind)
        assert peak is not None, self.kind
        return peak

    @property
    def dims(self) -> int:
        return len(self.pod)


# Google Cloud's pages on each TPU version; clocks follow from peak / (2 x multipliers). ICI: what of a link's rate is payload
# (Austin et al., How to Scale Your Model, 2025, part 2), both ways.
_THREE = {"side": 4, "cores": 2, "names_cores": True}
_TWO = {"pod": (16, 16), "side": 16, "cores": 1, "names_cores": False}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 1.05e9, 32e9, 1228e9, 0.9e11, pod=(16, 16, 16), **_THREE),
        Chip("v5e", "TPU v5 lite", 1.5e9, 16e9, 819e9, 0.9e11, **_TWO),
        Chip("v5p", "TPU v5", 1.75e9, 95e9, 2765e9, 1.8e11, pod=(16, 20, 28), **_THREE),
        Chip("v6e", "TPU v6 lite", 1.75e9, 32e9, 1640e9, 1.8e11, **_TWO),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice: chips in a box."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which axes are rings; the others are lines."""
        joined = tuple(n % self.chip.side == 0 for n in self.shape)
        return joined if self.chip.dims == 2 else (all(joined),) * len(joined)


def parse(name: str) -> Topology:
    """Reads the name of a slice.

    Args:
        name: `v5p:4x4x4`: chips along each axis; or `v5p-128`: Google's name, whose box is then the usual one.

    Raises:
        ConfigError: no such chip, or no such slice of them.
    """
    found = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:x\d+)*)|-(\d+))", name)
    kind = found[1] if found else re.split("[:-]", name)[0]
    check(
        kind in CHIPS,
        f"--topology {name}: no such chip; known are {', '.join(CHIPS)}, as in v5p:4x4x4 or v5p-128 "
        "(what a GPU or CPU at hand does, scripts/benchmark.py measures)",
    )
    if found is None:
        raise ConfigError(f"--topology {name}: write chips along each axis, as in v5p:4x4x4, or Google's name, as in v5p-128")
    chip = CHIPS[kind]
    if found[3]:
        n_chips, left = divmod(int(found[3]), chip.cores if chip.names_cores else 1)
        best = None if left else _compact(chip, n_chips)
        counts = "TensorCores, two a chip" if chip.names_cores else "chips"
        if best is None:
            raise ConfigError(f"--topology {name}: {kind} has no slice of {found[3]} ({counts}); {_near(chip, n_chips)}")
        return Topology(chip, best)
    shape = tuple(int(n) for n in found[2].split("x"))
    check(len(shape) == chip.dims, f"--topology {name}: a slice of {kind} has {chip.dims} axes, as in {_example(chip)}")
    if shape not in _boxes(chip):
        raise ConfigError(f"--topology {name}: {kind} has no such slice; {_near(chip, math.prod(shape))}")
    return Topology(chip, shape)


def _compact(chip: Chip, n_chips: int) -> tuple[int, ...] | None:
    """The usual box: the most compact one. Google lists its axes in ascending order, but for the smallest, 2x2x1."""
    fitting = [shape for shape in _boxes(chip) if math.prod(shape) == n_chips]
    return min(fitting, key=lambda shape: (max(shape), -min(shape), list(shape) != sorted(shape)), default=None)


def _boxes(chip: Chip) -> list[tuple[int, ...]]:
    """Slices there are: a chip, or hosts of 2x2 chips side by side; in three dimensions from 64 chips on cubes of so many."""
    if chip.dims == 2:
        return [(1, 1), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8), (8, 4), (8, 8), (8, 16), (16, 8), (16, 16)]
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    sides = range(4, max(chip.pod) + 1, 4)
    cubes = [(a, b, c) for a in sides for b in sides for c in sides]
    return small + [box for box in cubes if all(n <= most for n, most in zip(sorted(box), chip.pod, strict=True))]


def _near(chip: Chip, n_chips: int) -> str:
    sizes = sorted({math.prod(shape) for shape in _boxes(chip)}, key=lambda size: abs(size - n_chips))
    boxes = [Topology(chip, box) for size in sorted(sizes[:3]) if (box := _compact(chip, size))]
    return f"near it are {', '.join(map(str, boxes))}"


def _example(chip: Chip) -> str:
    return f"{chip.name}:{'x'.join('4' * chip.dims)}"
