"""Attention, per device and pure: one function, computed by the best kernel that the device has, or by XLA.

The kernels are in `kernels`. The plain form is here, for devices without one and for weights that are no softmax. Logits and
softmax are float32 whatever the compute dtype. Dims are those of `spec`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from mutransformer.config.kernels import SPLASH_FROM, AttentionKernel, device_kernel, unfit
from mutransformer.model import kernels
from mutransformer.model.matmul import MASKED, contract, differentiated
from mutransformer.model.ops import sqrelu
from mutransformer.sharding.collectives import varying_as
from mutransformer.sharding.mesh import traced_for


def _share(numerator: Array, eps: float) -> Array:
    return numerator / (eps + jnp.sum(numerator, axis=-1, keepdims=True))


# Masked float32 logits [..., query, key] and the norm's eps -> weights of the same shape. Softmax has a form of its own, below.
ATTENTION_ACTIVATIONS: dict[str, Callable[[Array, float], Array]] = {
    "sqrelu": lambda s, eps: sqrelu(s) / s.shape[-1],
    "elu": lambda s, eps: (jax.nn.elu(s) + 1) / s.shape[-1],
    "norm_sqrelu": lambda s, eps: _share(sqrelu(s), eps),
    "norm_elu": lambda s, eps: _share(jax.nn.elu(s) + 1, eps),
}


def attention(
    q: Float[Array, "b T h D"],
    k: Float[Array, "b T k D"],
    v: Float[Array, "b T k D"],
    scale: float,
    activation: str,
    eps: float,
    segments: Int[Array, "b T"] | None = None,
    kernel: AttentionKernel = "auto",
) -> Float[Array, "b T h D"]:
    """Causal attention; query head i reads key/value head i // (h / k).

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: the factor on q . k.
        activation: softmax, or a key of ATTENTION_ACTIVATIONS.
        eps: added to the sum of weights by the normalised activations.
        segments: of each position, which reads those of its own segment only; None: a row is one.
        kernel: that computes it, where it can: else xla does. auto: the device's, where it is the faster one.
    """
    b, T, h, D = q.shape
    device = traced_for()
    if kernel == "auto":
        kernel = _quickest(device_kernel(device.platform, device.device_kind), T, segments)
    if kernel != "xla" and not unfit(kernel, activation, T, D, q.dtype.name):
        q, k, v = (varying_as(a, q, k, v) for a in (q, k, v))
        if kernel == "splash":
            # It takes no scale, which fuses with what came before, such as rotary positions.
            q = (scale * q.astype(jnp.float32)).astype(q.dtype)
            q, k, v = _named(*(jnp.transpose(a, (0, 2, 1, 3)) for a in (q, k, v)))
            return jnp.transpose(kernels.splash(q, k, v, segments, interpret=device.platform == "cpu"), (0, 2, 1, 3))
        return checkpoint_name(kernels.cudnn(*_named(q, k, v), scale, segments), "attended")
    n_kv = k.shape[2]
    if activation == "softmax" and device.platform == "tpu":
        return checkpoint_name(_dense(*_named(q, k, v), segments, scale), "attended")
    q = jnp.transpose(q.reshape(b, T, n_kv, h // n_kv, D), (0, 2, 3, 1, 4))
    q, k, v = _named(q, *(jnp.transpose(a, (0, 2, 1, 3)) for a in (k, v)))
    if activation == "softmax":
        o = softmax_attention(q, k, v, scale, segments)
    else:
        logits = jnp.where(_readable(0, T, T, segments), scale * contract("bkgqd,bksd->bkgqs", q, k), MASKED)
        weights = ATTENTION_ACTIVATIONS[activation](logits, eps).astype(v.dtype)
        o = checkpoint_name(contract("bkgqs,bksd->bkgqd", weights, v).astype(v.dtype), "attended")
    return jnp.transpose(o, (0, 3, 1, 2, 4)).reshape(b, T, h, D)


class Cache(NamedTuple):
    """Keys and values of a row of T positions, of one layer; or of all, stacked in dim 0."""

    k: Float[Array, "*L b k T D"]
    v: Float[Array, "*L b k T D"]


class Past(NamedTuple):
    """What stands before a position: a cache that is right up to there, whatever it holds from there on."""

    cache: Cache
    position: Int[Array, ""]


def cached(k: Float[Array, "b T k D"], v: Float[Array, "b T k D"]) -> Cache:
    """As a cache holds them: laid out for attention's products, which else would do so anew for each token."""
    return Cache(*(jnp.transpose(a, (0, 2, 1, 3)) for a in (k, v)))


def attention_at(
    q: Float[Array, "b 1 h D"],
    k: Float[Array, "b 1 k D"],
    v: Float[Array, "b 1 k D"],
    past: Past,
    scale: float,
    activation: str,
    eps: float,
) -> Float[Array, "b 1 h D"]:
    """What `attention` gives at one position of a row, from what is new there and from what stands before it."""
    b, _, h, D = q.shape
    n_kv = k.shape[2]
    k, v = (
        lax.dynamic_update_slice_in_dim(old, new, past.position, axis=2)
        for old, new in zip(past.cache, cached(k, v), strict=True)
    )
    readable = (jnp.arange(k.shape[2]) <= past.position)[None, None, None]
    logits = scale * contract("bkgd,bksd->bkgs", q.reshape(b, n_kv, h // n_kv, D), k)
    logits = jnp.where(readable, logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1) if activation == "softmax" else ATTENTION_ACTIVATIONS[activation](logits, eps)
    return contract("bkgs,bksd->bkgd", weights.astype(v.dtype), v).astype(v.dtype).reshape(q.shape)


def _named(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """For rematerialisation by name: as attention's gradient reads them, so that they are not laid out twice."""
    return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")


@partial(jax.checkpoint, static_argnums=4, prevent_cse=False)
def _dense(
    q: Float[Array, "b T h D"], k: Float[Array, "b T k D"], v: Float[Array, "b T k D"], segments: Array | None, scale: float
) -> Float[Array, "b T h D"]:
    """Softmax attention as XLA:TPU is best at it: all logits at once, which it fuses with their softmax, and dims in the order
    in which projections give them. Keeps its arguments only. For use in a loop: see jax.checkpoint's prevent_cse."""
    b, T, h, D = q.shape
    n_kv = k.shape[2]
    g = "" if h == n_kv else "g"  # a dim of size 1 would keep XLA from reading q where it lies
    q = q.reshape(b, T, n_kv, h // n_kv, D) if g else q
    logits = scale * jnp.einsum(f"bqk{g}d,bskd->bk{g}qs", q, k, preferred_element_type=jnp.float32)
    readable = _readable(0, T, T, segments)
    weights = jax.nn.softmax(jnp.where(readable if g else readable[:, 0], logits, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum(f"bk{g}qs,bskd->bqk{g}d", weights, v).reshape(b, T, h, D)


def _quickest(kernel: AttentionKernel, T: int, segments: Array | None) -> AttentionKernel:
    """The device's kernel, or xla where that is faster."""
    if kernel == "splash" and T < SPLASH_FROM:
        return "xla"
    # cuDNN takes segments as an addend of T x T, whose gradient it computes too: not measured yet.
    return "xla" if kernel == "cudnn" and segments is not None else kernel


def _readable(first: int, n: int, m: int, segments: Int[Array, "b T"] | None) -> Bool[Array, "_ 1 1 n m"]:
    """Which of keys 0 ... m - 1 the queries first ... first + n - 1 may read: none behind, and of their own segment only."""
    causal = (first + jnp.arange(n)[:, None] >= jnp.arange(m)[None])[None, None, None]
    if segments is None:
        return causal
    same = segments[:, first : first + n, None] == segments[:, None, :m]
    return causal & same[:, None, None]


def _query_blocks(T: int) -> list[tuple[int, int]]:
    """Bounds of blocks of queries: a block reads no keys behind it, so that of the masked half most is never computed."""
    n = next(n for n in (4, 2, 1) if T % n == 0 and (n == 1 or T // n >= 64))
    return [(i * T // n, (i + 1) * T // n) for i in range(n)]


def _softmax_forward(q: Array, k: Array, v: Array, scale: float, segments: Array | None) -> tuple[Array, tuple[Any, ...]]:
    outs, norms = [], []
    for first, last in _query_blocks(q.shape[3]):
        logits = _block_logits(q, k, scale, segments, first, last)
        top = jnp.max(logits, axis=-1, keepdims=True)
        power = jnp.exp(logits - top)
        total = jnp.sum(power, axis=-1, keepdims=True)
        o = contract("bkgqs,bksd->bkgqd", power.astype(v.dtype), v[:, :, :last])
        outs.append((o / total).astype(v.dtype))
        norms.append(top + jnp.log(total))
    o, norm = (checkpoint_name(jnp.concatenate(parts, axis=3), "attended") for parts in (outs, norms))
    return o, (q, k, v, segments, o, norm)


def _softmax_backward(scale: float, saved: tuple[Any, ...], grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, o, norm = saved
    inner = jnp.sum(grad.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    grads_q, grad_k, grad_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for first, last in _query_blocks(q.shape[3]):
        rows = slice(first, last)
        p = jnp.exp(_block_logits(q, k, scale, segments, first, last) - norm[:, :, :, rows])
        grad_p = contract("bkgqd,bksd->bkgqs", grad[:, :, :, rows], v[:, :, :last])
        grad_s = (scale * p * (grad_p - inner[:, :, :, rows])).astype(q.dtype)
        grads_q.append(contract("bkgqs,bksd->bkgqd", grad_s, k[:, :, :last]).astype(q.dtype))
        behind = ((0, 0), (0, 0), (0, q.shape[3] - last), (0, 0))
        grad_k += jnp.pad(contract("bkgqs,bkgqd->bksd", grad_s, q[:, :, :, rows]), behind)
        grad_v += jnp.pad(contract("bkgqs,bkgqd->bksd", p.astype(v.dtype), grad[:, :, :, rows]), behind)
    return jnp.concatenate(grads_q, axis=3), grad_k.astype(k.dtype), grad_v.astype(v.dtype), None


@differentiated(_softmax_forward, _softmax_backward, static=(3,))
def softmax_attention(
    q: Float[Array, "b k g T D"],
    k: Float[Array, "b k T D"],
    v: Float[Array, "b k T D"],
    scale: float,
    segments: Int[Array, "b T"] | None,
) -> Float[Array, "b k g T D"]:
    """Causal softmax attention whose backward pass computes the weights again from their log-normaliser, as in FlashAttention
    (Dao et al., arXiv 2205.14135): nothing of size T x T is kept."""
    return _softmax_forward(q, k, v, scale, segments)[0]


def _block_logits(q: Array, k: Array, scale: float, segments: Array | None, first: int, last: int) -> Float[Array, "b k g n m"]:
    logits = scale * contract("bkgqd,bksd->bkgqs", q[:, :, :, first:last], k[:, :, :last])
    return jnp.where(_readable(first, last - first, last, segments), logits, MASKED)


def attention_logits(q: Float[Array, "b T h D"], k: Float[Array, "b T k D"], scale: float) -> Float[Array, "b k g n"]:
    """What softmax is taken of, for the n = T (T + 1) / 2 pairs of query and key that the causal mask lets through. To be
    looked at: attention itself keeps nothing of that size."""
    b, T, h, D = q.shape
    n_kv = k.shape[2]
    logits = scale * contract("btkgd,bskd->bkgts", q.reshape(b, T, n_kv, h // n_kv, D), k)
    query, key = jnp.tril_indices(T)
    return logits[..., query, key]
