"""The mathematics of a layer, per device and pure: norm, rotary positions, attention, activations, cross-entropy.

Weights do not enter here. Dims are those of `spec`; statistics, softmax and loss are float32 whatever the compute dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from mutransformer.collectives import index_y, max_y, sum_y

MASKED = -1e30  # a logit that no activation gives weight to, and no arithmetic turns into NaN


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
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None, :]
    cos, sin = (f(angle)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)


def sqrelu(x: Array) -> Array:
    """Squared ReLU (So et al., Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


# swiglu gates: its activation is silu, on a second projection (Shazeer, arXiv 2002.05202).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sqrelu": sqrelu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
}


def _share(numerator: Array, eps: float) -> Array:
    return numerator / (eps + jnp.sum(numerator, axis=-1, keepdims=True))


# Masked float32 logits [..., query, key] and the norm's eps -> weights of the same shape.
ATTENTION_ACTIVATIONS: dict[str, Callable[[Array, float], Array]] = {
    "softmax": lambda s, eps: jax.nn.softmax(s, axis=-1),
    "sqrelu": lambda s, eps: sqrelu(s) / s.shape[-1],
    "elu": lambda s, eps: (jax.nn.elu(s) + 1) / s.shape[-1],
    "norm_sqrelu": lambda s, eps: _share(sqrelu(s), eps),
    "norm_elu": lambda s, eps: _share(jax.nn.elu(s) + 1, eps),
}


def attention(
    q: Float[Array, "b T h D"], k: Float[Array, "b T k D"], v: Float[Array, "b T k D"], scale: float, activation: str, eps: float
) -> Float[Array, "b T h D"]:
    """Causal attention; query head i reads key/value head i // (h / k).

    Args:
        scale: the factor on q . k.
        activation: a key of ATTENTION_ACTIVATIONS.
        eps: added to the sum of weights by the normalised activations.
    """
    n_kv = k.shape[2]
    q = q.reshape(*q.shape[:2], n_kv, -1, q.shape[-1])
    logits = scale * jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
    T = q.shape[1]
    causal = jnp.tril(jnp.ones((T, T), dtype=bool))[None, None, None]
    weights = ATTENTION_ACTIVATIONS[activation](jnp.where(causal, logits, MASKED), eps).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(q.shape[0], T, -1, q.shape[-1])


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


def cross_entropy(logits: Float[Array, "b T v"], targets: Int[Array, "b T"], n_vocab: int) -> Float[Array, "b T"]:
    """-log softmax(logits)[target] in nats, over a vocabulary that is spread over y: three numbers per token move, no logits.

    Args:
        logits: this device's slice of the padded vocabulary.
        n_vocab: entries that are real; padding gets no probability.
    """
    logits = logits.astype(jnp.float32)
    v = logits.shape[-1]
    entry = index_y() * v + jnp.arange(v)
    if n_vocab != v * lax.axis_size("y"):
        logits = jnp.where((entry < n_vocab)[None, None], logits, MASKED)
    top = max_y(jnp.max(logits, axis=-1))
    norm = jnp.log(sum_y(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))) + top
    # A comparison, not an index: its gradient is elementwise and fuses, that of an index is a scatter.
    hit = targets[..., None] == entry[None, None]
    return norm - sum_y(jnp.sum(jnp.where(hit, logits, 0), axis=-1))


def shift_right(tokens: Int[Array, "b T"], bos_id: int) -> Int[Array, "b T"]:
    """What the model reads to predict each token: the row behind bos."""
    return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=bos_id)


def masked_sum(x: Float[Array, "b T"], mask: Bool[Array, "b T"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0))
