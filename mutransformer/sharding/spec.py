"""One declaration per weight: shape, sharding, fan-in and muP role are read off one arrow, and all else is derived from them.

Dims (uppercase is the global size, lowercase this device's shard of it):

    B b  batch, rows          b = B/x        F f  feed-forward width   f = F/y
    T    time, tokens a row                  V v  vocabulary (padded)  v = V/y
    M m  model width          m = M/y        D    width of a head
    H h  query heads          h = H/y        K k  key/value heads      k = K/y, or K where y does not divide it
    L    layers

An arrow names the dims that a weight contracts, then those it gives: "M/x -> H/y D" maps the residual stream to heads and rests
sharded on mesh axis x over M and on y over H. The shard along x gets no letter: only `collectives.gather_x` ever sees it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from jax.sharding import PartitionSpec

# residual: hidden, and writes to the residual stream. qk_gain: of the norms of queries and keys. outer_…: not in a layer.
Role = Literal["input", "hidden", "residual", "output", "gain", "qk_gain", "bias", "outer_gain", "outer_bias"]
Init = Literal["rule", "mup", "sp", "zero"]

WIDTH_DIMS = frozenset("MHKF")  # those that grow with the model, also where a variant holds one at 1


@dataclass(frozen=True)
class Dim:
    name: str
    size: int
    axis: str | None  # the mesh axis it rests on


@dataclass(frozen=True)
class Weight:
    """What is known of a weight before it exists. A leaf wherever a tree of specs is mapped over.

    Attributes:
        dims: the dims in order, a stack of layers first.
        n_out: how many of them, from the end, are not contracted.
        fan_in: terms summed into one output; 1 for vectors and for the embedding, whose input is one-hot.
        role: what muP's rules go by.
        init: `rule`: as the parametrization says; else the override.
        init_tag: what its random draw is keyed by; None: its path in the tree.
    """

    dims: tuple[Dim, ...]
    n_out: int
    fan_in: int
    role: Role
    init: Init = "rule"
    init_tag: int | None = None

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
        """Outputs that one input is spread to."""
        return prod(d.size for d in self.dims[-self.n_out :]) if self.n_out else 1

    @property
    def is_matrix(self) -> bool:
        return self.role in ("input", "hidden", "residual", "output")

    def dim_on(self, axis: str) -> int | None:
        """The position of the dim that rests on a mesh axis, or None."""
        return self.axes.index(axis) if axis in self.axes else None

    def off(self, axis: str) -> "Weight":
        """The spec of the same weight resting whole along a mesh axis."""
        return dataclasses.replace(
            self, dims=tuple(dataclasses.replace(d, axis=None) if d.axis == axis else d for d in self.dims)
        )

    def stacked(self, n_layer: int) -> "Weight":
        """The spec of n_layer such weights in one array."""
        return dataclasses.replace(self, dims=(Dim("L", n_layer, None), *self.dims))


def weight(
    arrow: str, sizes: Mapping[str, int], role: Role | None = None, init: Init = "rule", init_tag: int | None = None
) -> Weight:
    """Reads an arrow.

    Args:
        arrow: "in dims -> out dims", each dim a letter or letter/axis.
        sizes: the global size of each letter.
        role: must be given for vectors, and where it is residual. Other matrices tell theirs: width on both sides is hidden,
            only out input, only in output.
        init: an override of the initial scale.
        init_tag: as of Weight.
    """
    into, out = ([_dim(word, sizes) for word in side.split()] for side in arrow.split("->"))
    width_in, width_out = (any(d.name in WIDTH_DIMS for d in side) for side in (into, out))
    told: Role | None = None
    if into:
        told = "hidden" if width_in and width_out else "input" if width_out else "output" if width_in else None
    role = role or told
    assert role is not None, f"{arrow!r} does not tell its role"
    fan_in = prod(d.size for d in into) if width_in else 1
    return Weight(tuple(into + out), len(out), fan_in, role, init, init_tag)


def _dim(word: str, sizes: Mapping[str, int]) -> Dim:
    name, _, axis = word.partition("/")
    return Dim(name, sizes[name], axis or None)
