"""Attention in its plain form gives the numbers and gradients of a loop in float64, and a position sees none behind it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ops import EPS, by_difference, close, distance, f32, normal

from mutransformer.model.attention import ATTENTION_ACTIVATIONS, _query_blocks, attention


def plain_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, activation: str, eps: float = EPS, causal: bool = True
) -> np.ndarray:
    """A loop over queries: each sees a list of keys, and the rest of the row does not exist for it."""
    T, h, n_kv = *q.shape[1:3], k.shape[2]
    rows = []
    for t in range(T):
        seen = t + 1 if causal else T
        out = []
        for head in range(h):
            of = head // (h // n_kv)
            s = scale * np.sum(q[:, t, None, head] * k[:, :seen, of], -1)
            w = plain_weights(s, T, activation, eps)
            out.append(np.sum(w[..., None] * v[:, :seen, of], 1))
        rows.append(np.stack(out, 1))
    return np.stack(rows, 1)


def plain_weights(s: np.ndarray, T: int, activation: str, eps: float) -> np.ndarray:
    if activation == "softmax":
        power = np.exp(s - s.max(-1, keepdims=True))
        return power / power.sum(-1, keepdims=True)
    raw = np.maximum(s, 0) ** 2 if activation.endswith("sqrelu") else np.where(s > 0, s, np.exp(np.minimum(s, 0)) - 1) + 1
    return raw / (eps + raw.sum(-1, keepdims=True)) if activation.startswith("norm_") else raw / T


HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (3, 1)}
KINDS = ("softmax", *ATTENTION_ACTIVATIONS)


def qkv(T: int, h: int, n_kv: int, b: int = 2, D: int = 4) -> tuple[np.ndarray, ...]:
    return normal(0, b, T, h, D), normal(1, b, T, n_kv, D), normal(2, b, T, n_kv, D)


def value_and_grads(f: Callable[..., Any], by: Any) -> Callable[..., Any]:
    return lambda *args: (f(*args), *jax.grad(lambda *args: jnp.sum(f(*args) * by), (0, 1, 2))(*args))


@pytest.mark.parametrize(("heads", "activation"), [*((name, "softmax") for name in HEADS), *(("GQA", a) for a in KINDS[1:])])
def test_attention(heads, activation):
    h, n_kv = HEADS[heads]
    args, by = qkv(5, h, n_kv, b=1), normal(3, 1, 5, h, 4)
    attend = partial(attention, scale=0.7, activation=activation, eps=EPS)
    ours = jax.jit(value_and_grads(attend, f32(by)))(*map(f32, args))

    def plain(given: Sequence[np.ndarray], scale: float = 0.7, **change: Any) -> np.ndarray:
        return plain_attention(given[0], given[1], given[2], scale, activation, **change)

    def loss(i: int, x: np.ndarray) -> float:
        return float(np.sum(by * plain([x if i == j else a for j, a in enumerate(args)])))

    theirs = (plain(args), *(by_difference(partial(loss, i), args[i]) for i in range(3)))
    assert close(ours, theirs, 1e-5)
    for change in ({"causal": False}, {"scale": 1.0}, {"eps": 0.1} if "norm" in activation else {"scale": 0.5}):
        assert distance(ours[0], plain(args, **change)) > 1e-3


def whole_attention(
    q: Any, k: Any, v: Any, scale: float, causal: bool = True, segments: Any = None, activation: str = "softmax"
) -> Any:
    """Attention with the whole T x T matrix of logits."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    mask = (jnp.arange(T)[:, None] >= jnp.arange(T)[None] if causal else jnp.ones((T, T), bool))[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None])
    if activation == "softmax":
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), -1)
    else:
        weights = jnp.where(mask, jnp.square(jax.nn.relu(logits)), 0)
        weights = weights / (EPS + jnp.sum(weights, -1, keepdims=True)) if activation == "norm_sqrelu" else weights / T
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")


@pytest.mark.parametrize(
    ("T", "n_blocks"), [(1, 1), (64, 1), (127, 1), (128, 2), (130, 2), (254, 2), (256, 2), (300, 2), (510, 2), (512, 4)]
)
def test_blocks_of_queries_cover_them(T, n_blocks):
    bounds = _query_blocks(T)
    assert len(bounds) == n_blocks and [first for first, _ in bounds[1:]] == [last for _, last in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1]) == (0, T)


@pytest.mark.parametrize("T", [64, 128, 130, 256])
def test_softmax_attention_in_blocks_of_queries(T):
    args, by = tuple(map(f32, qkv(T, 4, 2))), f32(normal(3, 2, T, 4, 4))
    ours = jax.jit(value_and_grads(partial(attention, scale=0.7, activation="softmax", eps=EPS), by))(*args)
    theirs, control = jax.jit(
        lambda *args: (
            value_and_grads(partial(whole_attention, scale=0.7), by)(*args),
            whole_attention(*args, scale=0.7, causal=False),
        )
    )(*args)
    assert close(ours, theirs, 3e-6)
    assert distance(ours[0], control) > 1e-3


@pytest.mark.parametrize(("activation", "T"), [("softmax", 130), ("softmax", 256), ("sqrelu", 64), ("norm_sqrelu", 64)])
def test_attention_within_segments(activation, T):
    args, by = tuple(map(f32, qkv(T, 4, 2))), f32(normal(3, 2, T, 4, 4))
    borders = np.zeros((2, T), np.int32)
    borders[0, [3, 4, T // 2]] = borders[1, [T // 4 + 1, T - 1]] = 1  # one between two blocks of queries
    segments = jnp.cumsum(jnp.asarray(borders), 1)
    attend = partial(attention, scale=0.7, activation=activation, eps=EPS)
    whole = partial(whole_attention, scale=0.7, activation=activation)
    ours, theirs, control = jax.jit(
        lambda *args: (
            value_and_grads(partial(attend, segments=segments), by)(*args),
            value_and_grads(partial(whole, segments=segments), by)(*args),
            value_and_grads(whole, by)(*args),
        )
    )(*args)
    assert close(ours, theirs, 3e-6)
    assert all(distance(a, b) > 0.01 for a, b in zip(ours, control, strict=True))
    one = jax.jit(partial(attend, segments=jnp.zeros_like(segments)))(*args)
    assert distance(one, control[0]) < 3e-6


@pytest.mark.parametrize("activation", KINDS)
def test_attention_in_bfloat16(activation):
    args, by = (tuple(jnp.asarray(a, jnp.bfloat16) for a in arrays) for arrays in (qkv(130, 4, 2), (normal(3, 2, 130, 4, 4),)))
    attend = value_and_grads(partial(attention, scale=0.7, activation=activation, eps=EPS), by[0].astype(jnp.float32))
    ours, theirs = jax.jit(attend)(*args), jax.jit(attend)(*(a.astype(jnp.float32) for a in args))
    assert all(a.dtype == jnp.bfloat16 for a in ours)
    assert close(ours, theirs, 0.01)  # a few roundings of 2^-9 each


@pytest.mark.parametrize(("activation", "T"), [("softmax", 128), *((a, 12) for a in KINDS[1:])])
def test_a_position_sees_none_behind_it_and_no_other_row(activation, T):
    args = tuple(map(f32, qkv(T, 2, 1)))
    attend = partial(attention, scale=0.7, activation=activation, eps=EPS)
    t = T // 2 - 1 + T // 4  # within a later block

    def grads(row: int, at: int) -> tuple[np.ndarray, ...]:
        loss = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a)[row, at])), (0, 1, 2)))
        return tuple(map(np.asarray, loss(*args)))

    of_q, of_k, of_v = grads(0, t)
    for g in (of_q, of_k, of_v):
        assert not np.any(g[1]) and not np.any(g[0, t + 1 :])
        assert np.any(g[0, t])
    assert np.any(of_k[0, : t - 1]) and np.any(of_v[0, : t - 1])  # what lies before is seen, and so would be what lies behind


def test_far_logits_stay_finite():
    q, k, v = map(f32, qkv(8, 2, 2))
    attend = partial(attention, scale=1e4, activation="softmax", eps=EPS)
    out, *grads = jax.jit(value_and_grads(attend, 1.0))(q, k, v)
    assert all(np.all(np.isfinite(a)) for a in (out, *grads))
