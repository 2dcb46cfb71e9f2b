"""Attention at one position of each row, from a cache of the keys and values of those before it. For decoding; no gradient."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from mutransformer.model.attention import ATTENTION_ACTIVATIONS, contract
from mutransformer.model.ops import MASKED


class KVCache(NamedTuple):
    """Keys and values of a row of T positions, of one layer; or of all layers, stacked in dim 0.

    It may have a wider dtype than the keys and values that were put in.
    """

    k: Float[Array, "*L b k T D"]
    v: Float[Array, "*L b k T D"]

    @classmethod
    def of(cls, k: Float[Array, "b T k D"], v: Float[Array, "b T k D"]) -> "KVCache":
        """Keys and values in the layout of attention's products, so that decoding does not transpose them for every token."""
        return cls(*(jnp.transpose(a, (0, 2, 1, 3)) for a in (k, v)))


class DecodeState(NamedTuple):
    """What precedes a position of each row: a cache of all layers that is valid before it, whatever it holds from there on."""

    cache: KVCache
    positions: Int[Array, " b"]
    layer: Int[Array, ""] | int = 0  # whose keys and values are wanted


def decode_attention(
    q: Float[Array, "b 1 h D"],
    k: Float[Array, "b 1 k D"],
    v: Float[Array, "b 1 k D"],
    past: DecodeState,
    scale: float,
    activation: str,
    eps: float,
    n_lengths: int = 1,
) -> Float[Array, "b 1 h D"]:
    """What `attention` computes at one position of each row, from that position's q, k, v and the cache of what precedes it.

    n_lengths: of the cache's positions the first 1, 2, ... or all n_lengths parts are read, as few as hold what precedes.
    """
    b, _, h, D = q.shape
    n_kv, T = k.shape[2], past.cache.k.shape[3]
    own = KVCache(*(a.astype(past.cache.k.dtype) for a in KVCache.of(k, v)))  # not in the cache yet
    q = q.reshape(b, n_kv, h // n_kv, D)
    at = jnp.arange(T)[None]
    here, readable = (of(at, past.positions[:, None])[:, None, None] for of in (jnp.equal, jnp.less_equal))

    def read(product: Callable[[int, Callable[[Array], Array]], Array]) -> Array:
        """product(n, first) of the cache's first n positions, which `first` takes of its keys or values."""

        def of_first(n: int) -> Array:
            return product(n, lambda a: lax.dynamic_slice(a, (past.layer, 0, 0, 0, 0), (1, *a.shape[1:3], n, D))[0])

        if n_lengths == 1 or T % n_lengths:
            return of_first(T)
        part = T // n_lengths
        return lax.switch(jnp.max(past.positions) // part, [partial(of_first, part * i) for i in range(1, n_lengths + 1)])

    def logits_of(n: int, first: Callable[[Array], Array]) -> Array:
        found = contract("bkgd,bksd->bkgs", q.astype(own.k.dtype), first(past.cache.k))
        return jnp.pad(found, ((0, 0), (0, 0), (0, 0), (0, T - n)))

    own_logits = contract("bkgd,bksd->bkgs", q.astype(own.k.dtype), own.k)
    logits = jnp.where(readable, scale * jnp.where(here, own_logits, read(logits_of)), MASKED)
    weights = jax.nn.softmax(logits, axis=-1) if activation == "softmax" else ATTENTION_ACTIVATIONS[activation](logits, eps)
    weights = weights.astype(q.dtype).astype(own.v.dtype)
    past_weights, own_weight = jnp.where(here, 0, weights), jnp.sum(jnp.where(here, weights, 0), axis=-1, keepdims=True)
    o = read(lambda n, first: contract("bkgs,bksd->bkgd", past_weights[..., :n], first(past.cache.v)))
    return (o + own_weight.astype(jnp.float32) * own.v).astype(q.dtype).reshape(b, 1, h, D)
