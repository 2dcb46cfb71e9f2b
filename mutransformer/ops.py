"""The mathematics of a layer, per device and pure: norm, rotary positions, attention, activations, cross-entropy.

Weights do not enter here. Dims are those of `spec`; statistics, softmax are float32 whatever the compute dtype.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from mutransformer.collectives import index_y, sum_y
from mutransformer.linear import MASKED, contract, differentiated


def rms_norm(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """x / sqrt(mean(x^2) + eps) over a dim that this device holds whole (Zhang and Sennrich, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm_y(x: Float[Array, "b T m"], eps: float) -> Float[Array, "b T m"]:
    """The same over features that are spread over y: only the sum of squares moves."""
    wide = x.astype(jnp.float32)
    mean = sum_y(jnp.sum(jnp.square(wide), axis=-1, keepdims=True)) / (x.shape[-1] * lax.axis_size("y"))
    return (wide * lax.rsqrt(mean + eps)).astype(x.dtype)


def rotary(x: Float[Array, "b T n D"], base: float) -> Float[Array, "b T n D"]:
    """Rotary positions (Su et al., arXiv 2104.09864) on split halves: pair i is (x[i], x[i + D/2]), at base^(-2i/D)."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None, :])[None, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1).astype(x.dtype)


def _relu_forward(x: Array) -> tuple[Array, Array]:
    y = checkpoint_name(relu(x), "hidden")
    return y, y


def _relu_backward(y: Array, grad: Array) -> tuple[Array]:
    return (jnp.where(y > 0, grad, 0),)


@differentiated(_relu_forward, _relu_backward, static=())
def relu(x: Array) -> Array:
    """max(x, 0). Its gradient is read off the result, which the next projection keeps anyway; jax.nn.relu keeps a mask."""
    return jnp.maximum(x, 0)


def sqrelu(x: Array) -> Array:
    """Squared ReLU (So et al., Primer, arXiv 2109.08668)."""
    return jnp.square(relu(x))


# swiglu gates: its activation is silu, on a second projection (Shazeer, arXiv 2002.05202).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": relu,
    "sqrelu": sqrelu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
}


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
    """
    b, T, h, D = q.shape
    n_kv = k.shape[2]
    q = jnp.transpose(q.reshape(b, T, n_kv, h // n_kv, D), (0, 2, 3, 1, 4))
    k, v = (jnp.transpose(a, (0, 2, 1, 3)) for a in (k, v))
    if activation == "softmax":
        o = softmax_attention(q, k, v, scale, segments)
    else:
        logits = jnp.where(_readable(0, T, T, segments), scale * contract("bkgqd,bksd->bkgqs", q, k), MASKED)
        weights = ATTENTION_ACTIVATIONS[activation](logits, eps).astype(v.dtype)
        o = contract("bkgqs,bksd->bkgqd", weights, v).astype(v.dtype)
    return jnp.transpose(o, (0, 3, 1, 2, 4)).reshape(b, T, h, D)


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
    o, norm = jnp.concatenate(outs, axis=3), jnp.concatenate(norms, axis=3)
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


def select_kv(kv: Float[Array, "b T K D"], n_local: int, n_head: int) -> Float[Array, "b T k D"]:
    """The key/value heads that this device's query heads read, where all of them are here.

    Args:
        n_local: query heads on this device.
        n_head: query heads in all.
    """
    n_kv = kv.shape[2]
    if n_kv == 1 or n_local == n_head:
        return kv
    mine = (index_y() * n_local + jnp.arange(n_local)) // (n_head // n_kv)
    return jnp.take(kv, mine, axis=2)


def shift_right(tokens: Int[Array, "b T"], bos_id: int, segments: Int[Array, "b T"] | None = None) -> Int[Array, "b T"]:
    """What the model reads to predict each token: the row behind bos; with segments, each of them behind a bos of its own."""
    inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=bos_id)
    if segments is None:
        return inputs
    begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.where(begins, bos_id, inputs)
