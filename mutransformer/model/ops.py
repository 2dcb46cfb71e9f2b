"""The operations of a layer that need no weights, per device and pure: norms, rotary positions, activations, the model's inputs.

Dims are those of `sharding.spec`; statistics are float32 whatever the compute dtype.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from mutransformer.sharding.collectives import index_y, sum_y

MASKED = -1e30  # a logit without probability
Segments = Int[Array, "b T"] | None  # the segment of each position; None: a row is one segment


def rms_norm(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """x / sqrt(mean(x^2) + eps) over a dim that this device holds whole (Zhang and Sennrich, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm_y(x: Float[Array, "b T m"], eps: float) -> Float[Array, "b T m"]:
    """rms_norm over features that are sharded over y: only the sum of squares moves."""
    wide = x.astype(jnp.float32)
    mean = sum_y(jnp.sum(jnp.square(wide), axis=-1, keepdims=True)) / (x.shape[-1] * lax.axis_size("y"))
    return (wide * lax.rsqrt(mean + eps)).astype(x.dtype)


def rotary(
    x: Float[Array, "b T n D"], base: float, positions: Int[Array, "b T"] | None = None, context: int | None = None
) -> Float[Array, "b T n D"]:
    """Rotary positions (Su et al., arXiv 2104.09864) on split halves: pair i is (x[i], x[i + D/2]), at base^(-2i/D).

    Position t is that of x[:, t], or the positions are given, of `context` ones in all.
    """
    tables = rotary_table(x.shape[1] if context is None else context, x.shape[-1] // 2, base)
    if positions is None:
        cos, sin = (table[None, :, None, :] for table in tables)
    else:
        cos, sin = (jnp.take(jnp.asarray(table), positions, axis=0)[:, :, None] for table in tables)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1).astype(x.dtype)


@cache
def rotary_table(n: int, half: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [n, half] of the angles of rotary positions, float32.

    Computed in float64 on the host: in float32 an angle of position t is wrong by up to t x 2^-24 radians, which shows in the
    gradients of attention.
    """
    angle = np.arange(n)[:, None] * base ** (-np.arange(half, dtype=np.float64) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@jax.custom_gradient
def relu(x: Array) -> Any:
    """max(x, 0). Its gradient uses the result, which the next projection saves anyway; jax.nn.relu would save a mask."""
    y = checkpoint_name(jnp.maximum(x, 0), "hidden")
    return y, lambda grad: jnp.where(y > 0, grad, 0)


def sqrelu(x: Array) -> Array:
    """Squared ReLU (So et al., Primer, arXiv 2109.08668)."""
    return jnp.square(relu(x))


# swiglu gates: its activation is silu, on a second projection (Shazeer, arXiv 2002.05202).
ACTIVATIONS = {"relu": relu, "sqrelu": sqrelu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "swiglu": jax.nn.silu}


def select_kv(kv: Float[Array, "b T K D"], n_local: int, n_head: int) -> Float[Array, "b T k D"]:
    """The key/value heads that this device's n_local query heads, of n_head on all devices, read from all K of them."""
    n_kv = kv.shape[2]
    if n_kv == 1 or n_local == n_head:
        return kv
    heads = (index_y() * n_local + jnp.arange(n_local)) // (n_head // n_kv)
    return jnp.take(kv, heads, axis=2)


def shift_right(tokens: Int[Array, "b T"], bos_id: int, segments: Segments = None) -> Int[Array, "b T"]:
    """The model's inputs: the tokens shifted right by one, with bos in front of the row, or of each segment of it."""
    inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=bos_id)
    if segments is None:
        return inputs
    begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.where(begins, bos_id, inputs)
