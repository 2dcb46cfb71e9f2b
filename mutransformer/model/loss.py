"""The unembedding and its cross-entropy, in chunks of tokens: no device ever holds the logits of a whole batch.

Forward and backward are one pass: the gradient of the loss by the logits is known as soon as the logits are. Recomputing each
chunk's logits in the backward pass instead (jax.checkpoint in a scan) would add a fourth product of the unembedding's size to
the three of this pass.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from mutransformer.model.matmul import MatmulPolicy, dot, dot_rows
from mutransformer.model.ops import MASKED
from mutransformer.sharding.collectives import gather_x, index_y, max_y, scatter_x, sum_y, varying
from mutransformer.sharding.spec import Weight


class Head(NamedTuple):
    """The static settings of the unembedding."""

    spec: Weight
    policy: MatmulPolicy
    n_vocab: int  # entries of the padded vocabulary that are real; the others get no probability
    chunk: int  # tokens whose logits exist at a time
    z_loss: float = 0.0  # factor on the square of the log-normalizer (Chowdhery et al., arXiv 2204.02311, section 5)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def head_loss(
    h: Float[Array, "b T M"],
    w: Float[Array, "..."],
    bias: Float[Array, " v"] | None,
    targets: Int[Array, "b T"],
    mask: Bool[Array, "b T"],
    head: Head,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The objective, and the loss: the sum over unmasked targets of -log softmax(h w + bias)[target], in nats.

    They differ by the z-loss; only the objective has a gradient. Both are the same on all of y. The vocabulary is sharded over y:
    three numbers per token move, and no logits. h is the normed residual stream, gathered over y; w is this device's shard in
    float32, and bias its slice in the compute dtype.
    """
    return _head(h, w, bias, targets, mask, head, with_grads=False)[0]


def target_losses(
    h: Float[Array, "b T M"],
    w: Float[Array, "..."],
    bias: Float[Array, " v"] | None,
    targets: Int[Array, "b T"],
    mask: Bool[Array, "b T"],
    head: Head,
) -> Float[Array, "b T"]:
    """The loss of each target in nats, 0 where it is masked: what head_loss sums. Without a gradient."""
    return _head(h, w, bias, targets, mask, head, with_grads=False)[1]


def mean_square_of_logits(
    h: Float[Array, "b T M"], w: Float[Array, "..."], bias: Float[Array, " v"] | None, head: Head
) -> Float[Array, ""]:
    """The mean square of the logits over this device's tokens and the real vocabulary, as seen from this device's slice of it:
    the mean over y is the result."""
    gathered = gather_x(w, head.spec, head.policy.compute, head.policy.grad_reduce_dtype)
    v, tokens = gathered.shape[1], h.shape[0] * h.shape[1]
    real = index_y() * v + jnp.arange(v) < head.n_vocab

    def of_chunk(part: tuple[Array, Array]) -> Array:
        x, count = part
        logits = dot(x, gathered, (1, 0))
        logits = logits if bias is None else logits + bias.astype(jnp.float32)[None]
        return jnp.sum(jnp.where(real[None], jnp.square(logits), 0) * count[:, None])

    n = -(-tokens // head.chunk)
    parts = tuple(_in_chunks(a, n) for a in (h.reshape(tokens, -1), jnp.ones(tokens)))
    return jnp.sum(lax.map(of_chunk, parts)) * (lax.axis_size("y") / (tokens * head.n_vocab))


def _head_backward(head: Head, grads: tuple[Any, Any, Any], by: tuple[Array, Array]) -> tuple[Any, Any, Any, None, None]:
    scaled = jax.tree.map(lambda g: (g * by[0]).astype(g.dtype), grads)
    return *scaled, None, None


def _head(
    h: Array, w: Array, bias: Array | None, targets: Array, mask: Array, head: Head, with_grads: bool = True
) -> tuple[tuple[Array, Array], Any]:
    """head_loss, and with_grads the gradients of the objective by h, by w (reduce-scattered over x) and by bias; else the loss of
    each target."""
    gathered = gather_x(w, head.spec, head.policy.compute, head.policy.grad_reduce_dtype)
    M, v = gathered.shape
    entry = index_y() * v + jnp.arange(v)
    padded = head.n_vocab != v * lax.axis_size("y")

    def chunk(carry: tuple[Any, Array, Array], part: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        (objective, total), grad_w, grad_b = carry
        x, target, count = part
        logits = dot(x, gathered, (1, 0))
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)[None]
        if padded:
            logits = jnp.where((entry < head.n_vocab)[None], logits, MASKED)
        is_target = target[:, None] == entry[None]
        top = max_y(jnp.max(logits, axis=-1))
        power = jnp.exp(logits - top[:, None])
        norm = sum_y(jnp.sum(power, axis=-1))
        at_target = sum_y(_at(logits, target - entry[0]))
        log_norm, each = jnp.log(norm) + top, count * (jnp.log(norm) + top - at_target)
        loss = jnp.sum(each)
        scale = count / norm  # of the softmax's numerators in the gradient by the logits
        if head.z_loss:
            objective = objective + loss + head.z_loss * jnp.sum(count * jnp.square(log_norm))
            scale = scale * (1 + 2 * head.z_loss * log_norm)
        else:
            objective = objective + loss
        sums = objective, total + loss
        if not with_grads:
            return (sums, grad_w, grad_b), each
        grad = (power * scale[:, None] - jnp.where(is_target, count[:, None], 0)).astype(x.dtype)
        grad_b = grad_b + jnp.sum(grad, axis=0, dtype=jnp.float32) if bias is not None else grad_b
        grad_w = grad_w + dot_rows(x, grad, tiled=head.policy.merge_dims)
        return (sums, grad_w, grad_b), dot(grad, gathered, (1, 1)).astype(x.dtype)

    n = -(-targets.size // head.chunk)
    counts = mask.astype(jnp.float32)
    chunks: Any = tuple(_in_chunks(a, n) for a in (h.reshape(-1, M), targets.reshape(-1), counts.reshape(-1)))
    zeros = varying(jnp.zeros((M, v) if with_grads else (), jnp.float32)), varying(jnp.zeros(v if bias is not None else ()))
    zero = varying(jnp.zeros(()), "x")
    (sums, grad_w, grad_b), stacked = lax.scan(chunk, ((zero, zero), *zeros), chunks)
    if not with_grads:
        return sums, stacked.reshape(-1)[: targets.size].reshape(targets.shape)
    return sums, (
        stacked.reshape(-1, M)[: targets.size].reshape(h.shape),
        scatter_x(grad_w, head.spec, head.policy.grad_reduce_dtype),
        None if bias is None else grad_b.astype(bias.dtype),
    )


head_loss.defvjp(_head, _head_backward)


def _at(logits: Array, i: Array) -> Array:
    """The logit of entry i of each row, or 0 where i is not an entry: an entry of another device's slice of the vocabulary."""
    v = logits.shape[1]
    found = jnp.take_along_axis(logits, jnp.clip(i, 0, v - 1)[:, None], axis=1)[:, 0]
    return jnp.where((i >= 0) & (i < v), found, 0)


def _in_chunks(a: Array, n: int) -> Array:
    """[R, ...] -> [n, R / n, ...], padded with zeros: tokens that do not count."""
    short = -a.shape[0] % n
    return jnp.pad(a, ((0, short), *((0, 0),) * (a.ndim - 1))).reshape(n, -1, *a.shape[1:])
