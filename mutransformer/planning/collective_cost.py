"""How much a collective sends, and how many torus axes can carry it."""

import math
from collections.abc import Mapping
from itertools import combinations

from mutransformer.planning.chips import Topology


def sent_fraction(kind: str, n: int) -> float:
    """Bytes that each of n devices sends, per byte of the full array (gathered, or not yet reduced).

    all-gather, reduce-scatter, all-to-all: (n - 1) / n. all-reduce: twice that. collective-permute: 1.
    """
    if kind == "collective-permute":
        return 1.0
    return (n - 1) / n * (2 if kind == "all-reduce" else 1)


def torus_rings(topology: Topology, mesh: Mapping[str, int], axes: tuple[str, ...]) -> float:
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
    subsets = [chosen for count in range(len(places) + 1) for chosen in combinations(places, count)]
    dividing = [chosen for chosen in subsets if size % math.prod(free[place] for place in chosen) == 0]
    return max(dividing, key=lambda chosen: math.prod(free[place] for place in chosen))
