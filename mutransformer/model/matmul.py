"""Products of activations with weights: the projections and the embedding look-up.

Forward and backward are written out, for two reasons. A weight is gathered again for the backward pass, so that at most one
layer's weights are gathered at a time. And every product of compute-dtype factors is summed in float32, reduced over devices,
and rounded once.
"""

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import DTypeLike, Float, Int

from mutransformer.sharding.collectives import gather_x, varying_as
from mutransformer.sharding.spec import Weight

TILE = 32


class MatmulPolicy(NamedTuple):
    """How products with weights are computed."""

    compute: DTypeLike  # of the factors
    grad_reduce_dtype: DTypeLike  # in which gradients of weights are summed over devices
    # A projection is a product of two matrices, with merged dims and tiled transposes: XLA:CPU's fast product accepts no other. A
    # TPU chooses the layout of separate dims to suit what comes next, and writes a result straight into the stack that a scan
    # keeps: merged dims cost 81 ms of copies in a step of 469 ms (1.3 G parameters, 64 x 1 on v5p).
    merge_dims: bool


def dot(a: Float[Array, "*_"], b: Float[Array, "*_"], contract: tuple[int, int]) -> Float[Array, "*_"]:
    """The product of two matrices over dim contract[0] of a and contract[1] of b; summed in float32, the dtype of the result."""
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def dot_rows(a: Float[Array, "R M"], b: Float[Array, "R N"], tiled: bool) -> Float[Array, "M N"]:
    """a^T b in float32: the sum over rows of outer products, as in every weight's gradient.

    XLA:CPU's fast bfloat16 product takes no transposed left factor, and folds a plain transpose back into the product. It leaves
    a tiled transpose alone, and the product then takes half the time.
    """
    if not tiled or any(n % TILE for n in (*a.shape, b.shape[1])):
        return dot(a, b, (0, 0))
    if a.shape[1] <= b.shape[1]:  # transpose the narrower factor
        return dot(_tiled_transpose(a), b, (1, 0))
    return _tiled_transpose(dot(_tiled_transpose(b), a, (1, 0)))


def _tiled_transpose(a: Array) -> Array:
    n, m = a.shape
    return a.reshape(n // TILE, TILE, m // TILE, TILE).transpose(2, 3, 0, 1).reshape(m, n)


class Matrix(NamedTuple):
    """A gathered weight.

    The value is rounded to the compute dtype but typed float32, so that its gradient, a sum over all its uses, is not rounded
    before it is summed over devices. XLA removes the conversion together with its inverse.
    """

    value: Float[Array, "..."]
    shard: Float[Array, "..."] | None  # to be gathered again in the backward pass; None: value itself is kept for it


def gather_matrix(w: Float[Array, "..."], spec: Weight, policy: MatmulPolicy, regather: bool) -> Matrix:
    """Gathers the float32 shards of one layer's matrix over x, and with `regather` again for the backward pass. That is not
    needed where rematerialization recomputes this gather anyway."""
    value = gather_x(w, spec, policy.compute, policy.grad_reduce_dtype, typed=jnp.float32)
    return Matrix(value, lax.stop_gradient(w) if regather else None)


def project(x: Float[Array, "b T *into"], w: Matrix, spec: Weight, policy: MatmulPolicy) -> Float[Array, "b T *out"]:
    """x times a weight of one layer, contracted over the weight's input dims, of which x holds all that y does not shard."""
    into = w.value.ndim - spec.n_out
    rows, inner = tuple(range(x.ndim - into)), prod(w.value.shape[:into])

    @jax.custom_gradient
    def product(x: Array, w: Matrix) -> Any:
        def backward(grad: Array) -> tuple[Array, Matrix]:
            again = w.value if w.shard is None else gather_x(w.shard, spec, policy.compute, policy.grad_reduce_dtype)
            value = again.astype(x.dtype)
            if policy.merge_dims:
                grad = grad.reshape(-1, value.size // inner)
                grad_x = dot(grad, value.reshape(inner, -1), (1, 1)).reshape(x.shape)
                grad_w = dot_rows(x.reshape(-1, inner), grad, tiled=True).reshape(value.shape)
            else:
                out = tuple(range(-spec.n_out, 0))
                grad_x = jnp.tensordot(grad, value, (out, out), preferred_element_type=jnp.float32)
                grad_w = jnp.tensordot(x, grad, (rows, rows), preferred_element_type=jnp.float32)
            return grad_x.astype(x.dtype), Matrix(grad_w, None if w.shard is None else jnp.zeros_like(w.shard))

        value = w.value.astype(x.dtype)
        if policy.merge_dims:
            y = dot(x.reshape(-1, inner), value.reshape(inner, -1), (1, 0)).astype(x.dtype)
            y = y.reshape(*x.shape[: len(rows)], *value.shape[into:])
        else:
            y = jnp.tensordot(x, value, into, preferred_element_type=jnp.float32).astype(x.dtype)
        return y, backward

    return product(x, w)


def look_up(table: Float[Array, "V m"], ids: Int[Array, "b T"], compute: DTypeLike) -> Float[Array, "b T m"]:
    """Rows of a table, in the compute dtype.

    Their gradients are summed in float32: in bfloat16 the sum over the positions of a frequent token stops growing once it is a
    few hundred times as large as its terms. The table is gathered over x, with the values and type of Matrix.value.
    """

    @jax.custom_gradient
    def rows(table: Array, ids: Array) -> Any:
        def backward(grad: Array) -> tuple[Array, None]:
            zeros = varying_as(jnp.zeros(table.shape, jnp.float32), grad, ids)
            return zeros.at[ids].add(grad.astype(jnp.float32)), None

        return jnp.take(table.astype(compute), ids, axis=0), backward

    return rows(table, ids)
