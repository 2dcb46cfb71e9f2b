"""Every byte that moves between devices: the only module that calls collectives, for use inside shard_map.

A function's name says what happens and over which mesh axis: x, y, or z where there are several replicas of the grid of x and y.
Which dim of a weight is gathered follows from its spec.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike, Float

from mutransformer.sharding.spec import Weight

Tree = TypeVar("Tree")


def gather_x(w: Array, spec: Weight, compute: DTypeLike, reduce: DTypeLike, typed: DTypeLike | None = None) -> Array:
    """All-gathers the shards w of a weight over x. Its gradient is reduce-scattered over x in the dtype `reduce`.

    The weight is rounded to the dtype `compute`, in which it moves. The result, and so the gradient that comes back, has the
    dtype `typed`, by default `compute`. A weight without a dim on x is the same on all of x; its gradient is only summed.
    """
    same_on = tuple(axis for axis in ("x", "y") if axis not in {*spec.axes, *_varies_on(w)})
    # Marked as varying while still float32: the gradient of the mark is the sum over the copies.
    varying_w = lax.pcast(w, same_on, to="varying") if same_on else w

    def gather(w: Array) -> Array:
        w, dim = w.astype(compute), spec.dim_on("x")
        w = w if dim is None or lax.axis_size("x") == 1 else lax.all_gather(w, "x", axis=dim, tiled=True)
        return w.astype(typed or compute)

    return _linear(gather, lambda grad: scatter_x(grad, spec, reduce))(varying_w)


def scatter_x(grad: Array, spec: Weight, reduce: DTypeLike) -> Array:
    """Reduce-scatters the gradient of a gathered weight over x in the given dtype; gives the float32 shard of its sum."""
    grad, dim = grad.astype(reduce), spec.dim_on("x")
    if dim is not None and lax.axis_size("x") > 1:
        grad = lax.psum_scatter(grad, "x", scatter_dimension=dim, tiled=True)
    return grad.astype(jnp.float32)


def _linear(forward: Callable[[Array], Array], gradient: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A linear function whose gradient is computed by another one, from the gradient of its result."""
    function = jax.custom_vjp(forward)
    function.defvjp(lambda x: (forward(x), None), lambda _, grad: (gradient(grad),))
    return function


def gather_y(x: Float[Array, "b T m"], via_all_to_all: bool) -> Float[Array, "b T M"]:
    """All-gathers an activation over y. Gradient: as scatter_y."""
    if lax.axis_size("y") == 1:
        return x
    return _linear(_all_gather_y, lambda grad: _reduce_scatter_y(grad, via_all_to_all))(x)


def scatter_y(x: Float[Array, "b T M"], via_all_to_all: bool) -> Float[Array, "b T m"]:
    """Sums partial sums over y, of which each device keeps its slice. Gradient: an all-gather over y.

    via_all_to_all: every device sends each other device its slice, and adds up what it receives in float32; else it is a
    reduce-scatter. The same number of bytes moves. XLA:TPU overlaps an all-to-all with computation, but never a reduce-scatter
    over one axis: in a simulated step of 575 ms (1.3 G parameters, 16 x 4 on v5p) 109 ms were spent waiting for it; the copies
    and sums of the all-to-all cost 41 ms.
    """
    if lax.axis_size("y") == 1:
        return x
    return _linear(lambda x: _reduce_scatter_y(x, via_all_to_all), _all_gather_y)(x)


def _reduce_scatter_y(x: Array, via_all_to_all: bool) -> Array:
    if not via_all_to_all:
        return lax.psum_scatter(x, "y", scatter_dimension=2, tiled=True)
    slices = lax.all_to_all(x, "y", split_axis=2, concat_axis=0, tiled=True)
    return jnp.sum(slices.reshape(-1, x.shape[0], *slices.shape[1:]), axis=0, dtype=jnp.float32).astype(x.dtype)


def _all_gather_y(x: Array) -> Array:
    return lax.all_gather(x, "y", axis=2, tiled=True)


def gather_heads(x: Float[Array, "b T K d"]) -> Float[Array, "b T K D"]:
    """All-gathers key/value heads that are sharded inside the head over y. Gradient: a reduce-scatter over y."""
    return lax.all_gather(x, "y", axis=3, tiled=True)


def _has_z() -> bool:
    return "z" in jax.sharding.get_abstract_mesh().axis_names


def sum_rows(x: Array) -> Array:
    """The sum over all devices that hold other rows of the batch: over x, and over z."""
    return lax.psum(x, ("z", "x") if _has_z() else "x")


def varying_on_z(params: Tree) -> Tree:
    """Marks weights as this replica's own, so that their gradients are not summed over replicas before `sum_z` does it."""
    return jax.tree.map(lambda w: lax.pcast(w, "z", to="varying"), params) if _has_z() else params


def sum_z(grads: Tree, reduce: DTypeLike) -> Tree:
    """Sums gradients over replicas in the given dtype; the result is float32. Shards are summed, so the slow network between
    replicas carries no byte twice."""
    if not _has_z():
        return grads
    return jax.tree.map(lambda g: lax.psum(g.astype(reduce), "z").astype(jnp.float32), grads)


def sum_y(x: Array) -> Array:
    return lax.psum(x, "y")


def mean_xy(x: Array) -> Array:
    """The mean over all devices of x and y."""
    return lax.pmean(x, ("x", "y"))


def mean_devices(x: Array) -> Array:
    """The mean over all devices of the mesh."""
    return lax.pmean(x, ("z", "x", "y") if _has_z() else ("x", "y"))


def max_y(x: Array) -> Array:
    """The maximum over y, without a gradient."""
    return lax.pmax(lax.stop_gradient(x), "y")


def index_y() -> Array:
    """This device's index along y."""
    return lax.axis_index("y")


def varying(x: Array, *axes: str) -> Array:
    """Marks a constant as varying on the given axes (default: x and y), as the carry of a loop to which varying values are added
    must be. On any other axis of the mesh, such as the axis of a sweep's runs, everything varies."""
    others = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis not in ("x", "y"))
    return lax.pcast(x, (*others, *(axes or ("x", "y"))), to="varying")


def varying_as(tree: Any, *like: Array) -> Any:
    """Marks arrays as varying on every axis on which one of `like` varies."""
    axes = frozenset[str]().union(*map(_varies_on, like))

    def mark(x: Array) -> Array:
        more = tuple(sorted(axes - _varies_on(x)))
        return lax.pcast(x, more, to="varying") if more else x

    return jax.tree.map(mark, tree)


def _varies_on(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def without_vma_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces a function without shard_map's check of which values vary over which mesh axes (VMA).

    For kernels without VMA annotations that move nothing between devices. The results count as the same on every axis: mark them
    with varying_as. Only for use within a custom gradient: JAX would derive a wrong one from missing annotations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def unmarked(*args: Any) -> Any:
        # An argument keeps its mark until an operation changes its shape; these two operations cost nothing.
        return function(*jax.tree.map(lambda a: jnp.squeeze(jnp.expand_dims(a, 0), 0), args))

    replicated = PartitionSpec()  # the arguments are shards already: nothing is split further
    return jax.shard_map(unmarked, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False)
