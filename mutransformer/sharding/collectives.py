"""Every byte that moves between devices: the only file that spells collectives. For use inside shard_map over the axes x and y,
and where there are several such grids z.

A verb names what happens and on which axis. Which dim of a weight is gathered is read off its spec, never said twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike, Float

from mutransformer.sharding.spec import Weight

Tree = TypeVar("Tree")


def gather_x(w: Array, spec: Weight, compute: DTypeLike, reduce: DTypeLike, typed: DTypeLike | None = None) -> Array:
    """A weight as the layer uses it: cast to the compute dtype, then made whole along x.

    Its gradient is cast to `reduce`, summed over x, and scattered to where the weight rests.

    Args:
        w: this device's shard.
        spec: tells which dim rests on x. A weight without one is the same on all of x; its gradient is summed just so.
        compute: dtype to which it is rounded, and in which it moves.
        reduce: dtype in which its gradient moves.
        typed: dtype of the result, and so of the gradient that comes back; None: compute.
    """
    same_on = tuple(axis for axis in ("x", "y") if axis not in {*spec.axes, *_varies_on(w)})
    # Marked as this device's own copy while still float32: the mark's gradient is the sum over copies.
    own = lax.pcast(w, same_on, to="varying") if same_on else w
    return _gather_x(own, spec.dim_on("x"), jnp.dtype(compute), jnp.dtype(reduce), jnp.dtype(typed or compute))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather_x(w: Array, dim: int | None, compute: jnp.dtype, reduce: jnp.dtype, typed: jnp.dtype) -> Array:
    w = w.astype(compute)
    w = w if dim is None or lax.axis_size("x") == 1 else lax.all_gather(w, "x", axis=dim, tiled=True)
    return w.astype(typed)


def _gather_x_forward(w: Array, *static: Any) -> tuple[Array, None]:
    return _gather_x(w, *static), None


def _gather_x_backward(
    dim: int | None, compute: jnp.dtype, reduce: jnp.dtype, typed: jnp.dtype, _: None, grad: Array
) -> tuple[Array]:
    return (_scatter_x(grad, dim, reduce),)


_gather_x.defvjp(_gather_x_forward, _gather_x_backward)


def scatter_x(grad: Array, spec: Weight, reduce: DTypeLike) -> Array:
    """The gradient of a whole weight, summed over x in the given dtype -> float32, where the weight rests."""
    return _scatter_x(grad, spec.dim_on("x"), jnp.dtype(reduce))


def _scatter_x(grad: Array, dim: int | None, reduce: jnp.dtype) -> Array:
    grad = grad.astype(reduce)
    if dim is not None and lax.axis_size("x") > 1:
        grad = lax.psum_scatter(grad, "x", scatter_dimension=dim, tiled=True)
    return grad.astype(jnp.float32)


def gather_y(x: Float[Array, "b T m"], exchange: bool) -> Float[Array, "b T M"]:
    """An activation made whole along y. Gradient: as scatter_y."""
    return x if lax.axis_size("y") == 1 else _gather_y(x, exchange)


def scatter_y(x: Float[Array, "b T M"], exchange: bool) -> Float[Array, "b T m"]:
    """Partial sums over y -> this device's slice of their sum. Gradient: a gather over y.

    Args:
        x: this device's partial sums.
        exchange: every device sends each other its slice, and adds up what it gets, in float32; else a reduce-scatter. As many
            bytes move. XLA:TPU overlaps an all-to-all with computation, and never a reduce-scatter over one axis: of a step of
            575 ms (1.3 G parameters, 16 x 4 on v5p) 109 were waits for it; the exchange's copies and sums cost 41.
    """
    return x if lax.axis_size("y") == 1 else _scatter_y(x, exchange)


def _spread(x: Array, exchange: bool) -> Array:
    if not exchange:
        return lax.psum_scatter(x, "y", scatter_dimension=2, tiled=True)
    slices = lax.all_to_all(x, "y", split_axis=2, concat_axis=0, tiled=True)
    return jnp.sum(slices.reshape(-1, x.shape[0], *slices.shape[1:]), axis=0, dtype=jnp.float32).astype(x.dtype)


def _whole(x: Array) -> Array:
    return lax.all_gather(x, "y", axis=2, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_y(x: Array, exchange: bool) -> Array:
    return _whole(x)


_gather_y.defvjp(lambda x, exchange: (_whole(x), None), lambda exchange, _, grad: (_spread(grad, exchange),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scatter_y(x: Array, exchange: bool) -> Array:
    return _spread(x, exchange)


_scatter_y.defvjp(lambda x, exchange: (_spread(x, exchange), None), lambda exchange, _, grad: (_whole(grad),))


def gather_heads(x: Float[Array, "b T K d"]) -> Float[Array, "b T K D"]:
    """Key/value heads that rest split inside the head, made whole. Gradient: a reduce-scatter over y."""
    return lax.all_gather(x, "y", axis=3, tiled=True)


def _has_z() -> bool:
    return "z" in jax.sharding.get_abstract_mesh().axis_names


def sum_rows(x: Array) -> Array:
    """Over all devices that hold other rows of the batch: those of x, and of z."""
    return lax.psum(x, ("z", "x") if _has_z() else "x")


def own_on_z(params: Tree) -> Tree:
    """Weights marked as this grid's own copies, so that their gradients are not summed over grids before `sum_z` does it."""
    return jax.tree.map(lambda w: lax.pcast(w, "z", to="varying"), params) if _has_z() else params


def sum_z(grads: Tree, reduce: DTypeLike) -> Tree:
    """Gradients summed over grids in the given dtype -> float32. In shards: the slow network carries no byte twice."""
    if not _has_z():
        return grads
    return jax.tree.map(lambda g: lax.psum(g.astype(reduce), "z").astype(jnp.float32), grads)


def sum_y(x: Array) -> Array:
    return lax.psum(x, "y")


def mean_xy(x: Array) -> Array:
    """The mean over all devices of x and y, of what differs on both."""
    return lax.pmean(x, ("x", "y"))


def max_y(x: Array) -> Array:
    """The largest over y, without a gradient."""
    return lax.pmax(lax.stop_gradient(x), "y")


def index_y() -> Array:
    """This device's place on y."""
    return lax.axis_index("y")


def varying(x: Array, *axes: str) -> Array:
    """A constant marked as this device's own on the given axes, x and y by default, as what a loop will add to it is.

    On any other axis of the mesh, such as that of the runs of a sweep, everything varies.
    """
    others = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis not in ("x", "y"))
    return lax.pcast(x, (*others, *(axes or ("x", "y"))), to="varying")


def varying_as(tree: Any, *like: Array) -> Any:
    """Arrays marked as this device's own on every axis on which one of `like` is."""
    axes = frozenset[str]().union(*map(_varies_on, like))

    def mark(x: Array) -> Array:
        more = tuple(sorted(axes - _varies_on(x)))
        return lax.pcast(x, more, to="varying") if more else x

    return jax.tree.map(mark, tree)


def _varies_on(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that moves nothing between devices, traced without the check of what varies on which axis.

    For kernels that do not tell it. The results count as the same on every axis: mark them by varying_as. Only for use within a
    written-out gradient, for JAX would derive a wrong one from what it is not told.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def unmarked(*args: Any) -> Any:
        # An argument keeps its mark until an operation changes its shape; these two cost nothing.
        return function(*jax.tree.map(lambda a: jnp.squeeze(jnp.expand_dims(a, 0), 0), args))

    whole = PartitionSpec()  # already this device's own: nothing is split further, and no call is left in the program
    return jax.shard_map(unmarked, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
