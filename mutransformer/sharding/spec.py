"""One declaration per weight: shape, sharding, fan-in and muP role are read off one arrow; everything else is derived from them.

Dims (uppercase is the global size, lowercase this device's shard of it):

    B b  batch, rows          b = B/x        F f  feed-forward width   f = F/y
    T    time, tokens a row                  V v  vocabulary (padded)  v = V/y
    M m  model width          m = M/y        D    width of a head
    H h  query heads          h = H/y        K k  key/value heads      k = K/y, or K where y does not divide it
    L    layers

An arrow names the dims that a weight contracts, then those it produces: "M/x -> H/y D" maps the residual stream to heads and is
sharded over mesh axis x along M and over y along H. The shard along x has no letter: only `collectives.gather_x` ever sees it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from jax.sharding import PartitionSpec

from mutransformer.mup import Init, Role

WIDTH_DIMS = frozenset("MHKF")  # those that grow with the model, even where a variant holds one at 1


@dataclass(frozen=True)
class Dim:
    name: str
    size: int
    axis: str | None  # the mesh axis that it is sharded over


@dataclass(frozen=True)
class Weight:
    """What is known of a weight before it exists. A leaf of every tree of specs."""

    dims: tuple[Dim, ...]  # in order, a stack of layers first
    n_out: int  # how many of the dims, from the end, are not contracted
    fan_in: int  # terms summed into one output; 1 for vectors and for the embedding, whose input is one-hot
    role: Role  # decides which of muP's rules apply
    init: Init = "rule"  # `rule`: the parametrization's initial scale; else the override
    init_tag: int | None = None  # the number that its random draw is keyed by; None: a hash of its path in the tree
    nominal_fan_in: float | None = None  # before rounding to whole numbers, for rules of the learning rate; None: fan_in

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def axes(self) -> tuple[str | None, ...]:
        return tuple(d.axis for d in self.dims)

    @property
    def pspec(self) -> PartitionSpec:
        return PartitionSpec(*self.axes)

    @property
    def fan_out(self) -> int:
        """The number of outputs that one input reaches."""
        return prod(d.size for d in self.dims[-self.n_out :]) if self.n_out else 1

    @property
    def lr_fan_in(self) -> float:
        return float(self.fan_in) if self.nominal_fan_in is None else self.nominal_fan_in

    @property
    def is_matrix(self) -> bool:
        return self.role in ("input", "hidden", "residual", "output")

    def dim_on(self, axis: str) -> int | None:
        """The position of the dim that is sharded over a mesh axis, or None."""
        return self.axes.index(axis) if axis in self.axes else None

    def off(self, axis: str) -> "Weight":
        """The spec of the same weight, not sharded over a mesh axis."""
        return replace(self, dims=tuple(replace(d, axis=None) if d.axis == axis else d for d in self.dims))

    def stacked(self, n_layer: int) -> "Weight":
        """The spec of n_layer such weights in one array."""
        return replace(self, dims=(Dim("L", n_layer, None), *self.dims))


def weight(
    arrow: str,
    sizes: Mapping[str, int],
    role: Role | None = None,
    init: Init = "rule",
    init_tag: int | None = None,
    nominal_fan_in: float | None = None,
) -> Weight:
    """Reads an arrow: "in dims -> out dims", each dim a letter or letter/axis. sizes: the global size of each letter.

    A role is required for vectors, and for residual. The role of other matrices is inferred: width on both sides is hidden, only
    out input, only in output. The other arguments are as in Weight.
    """

    def dim(word: str) -> Dim:
        name, _, axis = word.partition("/")
        return Dim(name, sizes[name], axis or None)

    into, out = ([dim(word) for word in side.split()] for side in arrow.split("->"))
    width_in, width_out = (any(d.name in WIDTH_DIMS for d in side) for side in (into, out))
    if role is None and into:
        role = "hidden" if width_in and width_out else "input" if width_out else "output" if width_in else None
    assert role is not None, f"{arrow!r}: its role cannot be inferred"
    fan_in = prod(d.size for d in into) if width_in else 1
    return Weight(tuple(into + out), len(out), fan_in, role, init, init_tag, nominal_fan_in)
