"""A matrix in use, and what is multiplied by it: projections, and the unembedding with its cross-entropy.

Forward and backward are written out, for three reasons. A weight is gathered again for the backward pass, so that no more than
one layer's is ever whole. Every product of compute-dtype factors is summed in float32, reduced over devices, and rounded once.
And the gradient of the loss by the logits is known as soon as they are, so that logits exist for a few tokens at a time only.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, DTypeLike, Float, Int

from mutransformer.sharding.collectives import gather_x, index_y, max_y, scatter_x, sum_y, varying, varying_as
from mutransformer.sharding.mesh import traced_for
from mutransformer.sharding.spec import Weight

MASKED = -1e30  # a logit without probability
TILE = 32


F = TypeVar("F", bound=Callable[..., Any])


def differentiated(forward: Callable[..., Any], backward: Callable[..., Any], static: tuple[int, ...]) -> Callable[[F], F]:
    """jax.custom_vjp as a decorator that keeps the function's type.

    Args:
        forward: the function's arguments -> (its result, what to keep).
        backward: static arguments, what was kept, the result's gradient -> the gradients of the other arguments.
        static: positions of arguments that are no arrays.
    """

    def decorate(function: F) -> F:
        wrapped = jax.custom_vjp(function, nondiff_argnums=static)
        wrapped.defvjp(forward, backward)
        return cast(F, wrapped)

    return decorate


class Precision(NamedTuple):
    """compute: dtype of factors. grad_reduce_dtype: dtype in which gradients are summed over devices."""

    compute: DTypeLike
    grad_reduce_dtype: DTypeLike


def dot(a: Float[Array, "*_"], b: Float[Array, "*_"], contract: tuple[int, int]) -> Float[Array, "*_"]:
    """The product of two matrices over dim contract[0] of a and contract[1] of b, summed in float32 and left so."""
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def dot_rows(a: Float[Array, "R M"], b: Float[Array, "R N"]) -> Float[Array, "M N"]:
    """a^T b: the sum over rows of outer products, in float32. The shape of every weight's gradient."""
    return _dot_rows_cpu(a, b) if _on_cpu() else dot(a, b, (0, 0))


def _dot_rows_cpu(a: Array, b: Array) -> Array:
    # XLA's fast matrix product for bfloat16 on a CPU takes no transposed left factor, and folds a plain transpose back into the
    # product. One in tiles it leaves alone: the product then takes half the time. The narrower factor is the one to turn.
    if any(n % TILE for n in (*a.shape, b.shape[1])):
        return dot(a, b, (0, 0))
    if a.shape[1] <= b.shape[1]:
        return dot(_turn(a), b, (1, 0))
    return _turn(dot(_turn(b), a, (1, 0)))


def _turn(a: Array) -> Array:
    n, m = a.shape
    return a.reshape(n // TILE, TILE, m // TILE, TILE).transpose(2, 3, 0, 1).reshape(m, n)


def _contract_forward(equation: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(equation, a, b), (a, b)


def _contract_backward(equation: str, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    a, b = saved
    dims_a, dims_b, dims_out = equation.replace("->", ",").split(",")
    grad = grad.astype(a.dtype)
    grad_a = jnp.einsum(f"{dims_out},{dims_b}->{dims_a}", grad, b, preferred_element_type=jnp.float32)
    grad_b = jnp.einsum(f"{dims_a},{dims_out}->{dims_b}", a, grad, preferred_element_type=jnp.float32)
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


@differentiated(_contract_forward, _contract_backward, static=(0,))
def contract(equation: str, a: Array, b: Array) -> Array:
    """einsum of two activations, summed in float32 and left so. In its gradient, too, factors have the compute dtype."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


class Matrix(NamedTuple):
    """A weight in use.

    Attributes:
        value: whole along x; rounded to the compute dtype but typed float32, so that its gradient, the sum over all that it is
            multiplied by, is not rounded before it is summed over devices. XLA drops the conversion together with its inverse.
        shard: what to gather again for the backward pass; None: value itself is kept for it.
    """

    value: Float[Array, "..."]
    shard: Float[Array, "..."] | None


def whole(w: Float[Array, "..."], spec: Weight, precision: Precision, again: bool) -> Matrix:
    """Gathers a matrix.

    Args:
        w: this device's shard, float32.
        spec: of the weight, for one layer.
        precision: dtypes.
        again: gather it again for the backward pass. Needless where the backward pass computes all of this again anyway.
    """
    return Matrix(gather_x(w, spec, *precision, typed=jnp.float32), lax.stop_gradient(w) if again else None)


def _on_cpu() -> bool:
    """Whether what is traced is for a CPU.

    There a projection is a product of two matrices, its dims merged: its fast product takes no others. A TPU lays the dims out as
    what comes next wants them, and writes a result straight into the stack that a scan keeps of it, only while they are apart:
    merged they cost 81 ms of copies in a step of 469 (1.3 G parameters, 64 x 1 on v5p).
    """
    return traced_for().platform == "cpu"


Kept = tuple[Array, Array | None, Array | None]


def _project_forward(x: Array, w: Matrix, spec: Weight, precision: Precision) -> tuple[Array, Kept]:
    return project(x, w, spec, precision), (x, w.value if w.shard is None else None, w.shard)


def _project_backward(spec: Weight, precision: Precision, kept: Kept, grad: Array) -> tuple[Array, Matrix]:
    x, value, shard = kept
    if value is None:
        assert shard is not None
        value = gather_x(shard, spec, *precision)
    value = value.astype(x.dtype)
    into = value.ndim - spec.n_out
    if _on_cpu():
        inner = prod(value.shape[:into])
        grad = grad.reshape(-1, value.size // inner)
        grad_x = dot(grad, value.reshape(inner, -1), (1, 1)).reshape(x.shape)
        grad_w = dot_rows(x.reshape(-1, inner), grad).reshape(value.shape)
    else:
        out, rows = tuple(range(-spec.n_out, 0)), tuple(range(x.ndim - into))
        grad_x = jnp.tensordot(grad, value, (out, out), preferred_element_type=jnp.float32)
        grad_w = jnp.tensordot(x, grad, (rows, rows), preferred_element_type=jnp.float32)
    return grad_x.astype(x.dtype), Matrix(grad_w, None if shard is None else jnp.zeros_like(shard))


@differentiated(_project_forward, _project_backward, static=(2, 3))
def project(x: Float[Array, "b T *into"], w: Matrix, spec: Weight, precision: Precision) -> Float[Array, "b T *out"]:
    """x times a weight, over the weight's in dims.

    Args:
        x: activations in the compute dtype, whole along the weight's in dims as far as y does not split them.
        w: the weight.
        spec: of the weight, for one layer.
        precision: dtypes.
    """
    value = w.value.astype(x.dtype)
    into = value.ndim - spec.n_out
    if not _on_cpu():
        return jnp.tensordot(x, value, into, preferred_element_type=jnp.float32).astype(x.dtype)
    rows, inner = x.shape[: x.ndim - into], prod(value.shape[:into])
    y = dot(x.reshape(-1, inner), value.reshape(inner, -1), (1, 0))
    return y.astype(x.dtype).reshape(*rows, *value.shape[into:])


def _look_up_forward(table: Array, ids: Array, spec: Weight, compute: DTypeLike) -> tuple[Array, Array]:
    return look_up(table, ids, spec, compute), ids


def _look_up_backward(spec: Weight, compute: DTypeLike, ids: Array, grad: Array) -> tuple[Array, None]:
    none = varying_as(jnp.zeros((spec.shape[0], grad.shape[-1]), jnp.float32), grad, ids)
    return none.at[ids].add(grad.astype(jnp.float32)), None


@differentiated(_look_up_forward, _look_up_backward, static=(2, 3))
def look_up(table: Float[Array, "V m"], ids: Int[Array, "b T"], spec: Weight, compute: DTypeLike) -> Float[Array, "b T m"]:
    """Rows of a table, in the compute dtype. Their gradients are summed in float32: in bfloat16 the sum over a frequent token's
    places stops growing once it is some hundred times as large as what is added.

    Args:
        table: whole along x; rounded to the compute dtype but typed float32, as Matrix.value is.
        ids: which rows.
        spec: of the table.
        compute: dtype of the result.
    """
    return jnp.take(table.astype(compute), ids, axis=0)


class Head(NamedTuple):
    """What is fixed of the unembedding.

    Attributes:
        spec: of the matrix.
        precision: dtypes.
        n_vocab: entries of the padded vocabulary that are real; the others get no probability.
        chunk: tokens whose logits exist at a time.
        z_loss: the factor on the square of the log-normaliser (Chowdhery et al., arXiv 2204.02311, section 5).
    """

    spec: Weight
    precision: Precision
    n_vocab: int
    chunk: int
    z_loss: float = 0.0


def _head_forward(
    h: Array, w: Array, bias: Array | None, targets: Array, mask: Array, head: Head
) -> tuple[tuple[Array, Array], tuple[Any, Any, Any]]:
    return _head(h, w, bias, targets, mask, head, with_grads=True)


def _head_backward(head: Head, grads: tuple[Any, Any, Any], by: tuple[Array, Array]) -> tuple[Any, Any, Any, None, None]:
    scaled = jax.tree.map(lambda g: (g * by[0]).astype(g.dtype), grads)
    return *scaled, None, None


@differentiated(_head_forward, _head_backward, static=(5,))
def head_loss(
    h: Float[Array, "b T M"],
    w: Float[Array, "..."],
    bias: Float[Array, " v"] | None,
    targets: Int[Array, "b T"],
    mask: Bool[Array, "b T"],
    head: Head,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is minimised, and the loss: the sum over unmasked targets of -log softmax(h w + bias)[target], in nats. They differ
    by the z-loss; only the first has a gradient. Both are the same on all of y.

    The vocabulary is spread over y: three numbers a token move, and no logits.

    Args:
        h: normed residual stream, whole along y.
        w: this device's shard of the unembedding, float32.
        bias: this device's slice of it in the compute dtype.
        targets: ids.
        mask: the targets that count.
        head: the rest.
    """
    return _head(h, w, bias, targets, mask, head, with_grads=False)[0]


def _head(
    h: Array, w: Array, bias: Array | None, targets: Array, mask: Array, head: Head, with_grads: bool
) -> tuple[tuple[Array, Array], tuple[Any, Any, Any]]:
    """As head_loss; and if asked for the gradient of the first by h, by w (scattered to where w rests) and by bias."""
    whole = gather_x(w, head.spec, *head.precision)
    M, v = whole.shape
    entry = index_y() * v + jnp.arange(v)
    padded = head.n_vocab != v * lax.axis_size("y")

    def chunk(carry: tuple[Any, Array, Array], part: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        (goal, total), grad_w, grad_b = carry
        x, target, count = part
        logits = dot(x, whole, (1, 0))
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)[None]
        if padded:
            logits = jnp.where((entry < head.n_vocab)[None], logits, MASKED)
        # A comparison, not an index: its gradient is elementwise and fuses, that of an index is a scatter.
        hit = target[:, None] == entry[None]
        top = max_y(jnp.max(logits, axis=-1))
        power = jnp.exp(logits - top[:, None])
        norm = sum_y(jnp.sum(power, axis=-1))
        at_target = sum_y(jnp.sum(jnp.where(hit, logits, 0), axis=-1))
        log_norm, loss = jnp.log(norm) + top, jnp.sum(count * (jnp.log(norm) + top - at_target))
        share = count / norm
        if head.z_loss:
            goal = goal + loss + head.z_loss * jnp.sum(count * jnp.square(log_norm))
            share = share * (1 + 2 * head.z_loss * log_norm)
        else:
            goal = goal + loss
        totals = goal, total + loss
        if not with_grads:
            return (totals, grad_w, grad_b), jnp.zeros(())
        d = (power * share[:, None] - jnp.where(hit, count[:, None], 0)).astype(x.dtype)
        grad_b = grad_b + jnp.sum(d, axis=0, dtype=jnp.float32) if bias is not None else grad_b
        return (totals, grad_w + dot_rows(x, d), grad_b), dot(d, whole, (1, 1)).astype(x.dtype)

    n = -(-targets.size // head.chunk)
    counts = mask.astype(jnp.float32)
    parts: Any = tuple(_in_chunks(a, n) for a in (h.reshape(-1, M), targets.reshape(-1), counts.reshape(-1)))
    zero = varying(jnp.zeros((M, v) if with_grads else (), jnp.float32)), varying(jnp.zeros(v if bias is not None else ()))
    none = varying(jnp.zeros(()), "x")
    (totals, grad_w, grad_b), grad_h = lax.scan(chunk, ((none, none), *zero), parts)
    if not with_grads:
        return totals, (None, None, None)
    return totals, (
        grad_h.reshape(-1, M)[: targets.size].reshape(h.shape),
        scatter_x(grad_w, head.spec, head.precision.grad_reduce_dtype),
        None if bias is None else grad_b.astype(bias.dtype),
    )


def _in_chunks(a: Array, n: int) -> Array:
    """[R, ...] -> [n, R / n, ...], padded with zeros: a token that counts for nothing."""
    short = -a.shape[0] % n
    return jnp.pad(a, ((0, short), *((0, 0),) * (a.ndim - 1))).reshape(n, -1, *a.shape[1:])
