"""Each operation gives the numbers and gradients of a plain formula in float64, and a position sees none behind it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mutransformer import ops
from mutransformer.config import MeshConfig
from mutransformer.mesh import make_mesh

EPS = 1e-5


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def f32(a: np.ndarray) -> jax.Array:
    return jnp.asarray(a, jnp.float32)


def distance(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def close(ours: Any, theirs: Any, tolerance: float) -> bool:
    return all(distance(a, b) <= tolerance for a, b in zip(ours, theirs, strict=True))


def by_difference(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of f at x in float64, by central differences."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[i] += step
        low[i] -= step
        grad[i] = (f(high) - f(low)) / (2 * step)
    return grad


def plain_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def test_rms_norm():
    x, by = normal(0, 2, 3, 6), normal(1, 2, 3, 6)
    assert distance(ops.rms_norm(f32(x), EPS), plain_norm(x)) < 1e-6
    grad = jax.grad(lambda x: jnp.sum(ops.rms_norm(x, EPS) * f32(by)))(f32(x))
    assert distance(grad, by_difference(lambda x: float(np.sum(plain_norm(x) * by)), x)) < 1e-5


def test_rms_norm_adds_eps_to_the_mean():
    assert distance(ops.rms_norm(jnp.full((1, 4), 1e-3), 1e-6), np.full((1, 4), 1 / np.sqrt(2))) < 1e-6
    assert not np.any(ops.rms_norm(jnp.zeros((1, 4)), EPS))


def test_rms_norm_keeps_its_statistics_in_float32():
    x = 200 * normal(0, 2, 3, 512)
    low = jnp.asarray(x, jnp.bfloat16)
    out = ops.rms_norm(low, EPS)
    assert out.dtype == jnp.bfloat16
    assert distance(out, plain_norm(np.asarray(low, np.float64))) < 2**-8  # one rounding


@pytest.mark.parametrize("grid", [(1, 1), (2, 4)])
def test_rms_norm_over_features_spread_over_y(grid):
    x, by = normal(0, 4, 3, 8), normal(1, 4, 3, 8)
    mesh = make_mesh(MeshConfig(*grid), jax.devices()[: grid[0] * grid[1]])
    spread = P("x", None, "y")
    norm = jax.shard_map(partial(ops.rms_norm_y, eps=EPS), mesh=mesh, in_specs=spread, out_specs=spread)
    value, grad = jax.jit(lambda x: (norm(x), jax.grad(lambda x: jnp.sum(norm(x) * f32(by)))(x)))(f32(x))
    assert distance(value, plain_norm(x)) < 1e-6
    assert distance(grad, by_difference(lambda x: float(np.sum(plain_norm(x) * by)), x)) < 1e-5


def plain_rotary(x: np.ndarray, base: float) -> np.ndarray:
    """Pairs as complex numbers, turned by position x frequency."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * base ** (-2 * np.arange(half) / (2 * half)))
    z = z * turn[None, :, None]
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_rotary(base):
    x, by = normal(0, 2, 9, 3, 8), normal(1, 2, 9, 3, 8)
    assert distance(ops.rotary(f32(x), base), plain_rotary(x, base)) < 1e-6
    grad = jax.grad(lambda x: jnp.sum(ops.rotary(x, base) * f32(by)))(f32(x))
    turned_back = plain_rotary(by[:, ::-1], base)  # the formula is linear: its gradient does not depend on x
    assert distance(grad, by_difference(lambda x: float(np.sum(plain_rotary(x, base) * by)), x)) < 1e-5
    assert distance(grad, turned_back) > 0.1


def test_rotary_products_depend_on_relative_positions_only():
    q, k = (np.broadcast_to(normal(i, 1, 1, 1, 16), (1, 12, 1, 16)) for i in (0, 1))
    q, k = (np.asarray(ops.rotary(f32(a), 100.0), np.float64)[0, :, 0] for a in (q, k))
    products = q @ k.T
    for apart in range(-5, 6):
        along = np.diagonal(products, apart)
        assert np.ptp(along) < 1e-5
    assert np.ptp(products[0]) > 0.1


def test_rotary_in_bfloat16():
    x = jnp.asarray(normal(0, 1, 300, 2, 8), jnp.bfloat16)
    out = ops.rotary(x, 10000.0)
    assert out.dtype == jnp.bfloat16
    assert distance(out, plain_rotary(np.asarray(x, np.float64), 10000.0)) < 2**-8  # one rounding: angles are float32


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "sqrelu": lambda x: np.maximum(x, 0) ** 2,
    "gelu": gelu,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_activations(name):
    x = normal(0, 200) * 2
    assert distance(ops.ACTIVATIONS[name](f32(x)), PLAIN[name](x)) < 1e-6
    grad = jax.grad(lambda x: jnp.sum(ops.ACTIVATIONS[name](x)))(f32(x))
    assert distance(grad, by_difference(lambda x: float(PLAIN[name](x).sum()), x)) < 1e-5


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
KINDS = ("softmax", *ops.ATTENTION_ACTIVATIONS)


def qkv(T: int, h: int, n_kv: int, b: int = 2, D: int = 4) -> tuple[np.ndarray, ...]:
    return normal(0, b, T, h, D), normal(1, b, T, n_kv, D), normal(2, b, T, n_kv, D)


def value_and_grads(f: Callable[..., Any], by: Any) -> Callable[..., Any]:
    return lambda *args: (f(*args), *jax.grad(lambda *args: jnp.sum(f(*args) * by), (0, 1, 2))(*args))


@pytest.mark.parametrize(("heads", "activation"), [*((name, "softmax") for name in HEADS), *(("GQA", a) for a in KINDS[1:])])
def test_attention(heads, activation):
    h, n_kv = HEADS[heads]
    args, by = qkv(5, h, n_kv, b=1), normal(3, 1, 5, h, 4)
    attend = partial(ops.attention, scale=0.7, activation=activation, eps=EPS)
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


@pytest.mark.parametrize(("T", "n_blocks"), [(1, 1), (64, 1), (127, 1), (128, 2), (130, 2), (254, 2), (256, 4), (300, 4)])
def test_blocks_of_queries_cover_them(T, n_blocks):
    bounds = ops._query_blocks(T)
    assert len(bounds) == n_blocks and [first for first, _ in bounds[1:]] == [last for _, last in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1]) == (0, T)


@pytest.mark.parametrize("T", [64, 128, 130, 256])
def test_softmax_attention_in_blocks_of_queries(T):
    args, by = tuple(map(f32, qkv(T, 4, 2))), f32(normal(3, 2, T, 4, 4))
    ours = jax.jit(value_and_grads(partial(ops.attention, scale=0.7, activation="softmax", eps=EPS), by))(*args)
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
    attend = partial(ops.attention, scale=0.7, activation=activation, eps=EPS)
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
    attend = value_and_grads(partial(ops.attention, scale=0.7, activation=activation, eps=EPS), by[0].astype(jnp.float32))
    ours, theirs = jax.jit(attend)(*args), jax.jit(attend)(*(a.astype(jnp.float32) for a in args))
    assert all(a.dtype == jnp.bfloat16 for a in ours)
    assert close(ours, theirs, 0.01)  # a few roundings of 2^-9 each


@pytest.mark.parametrize(("activation", "T"), [("softmax", 128), *((a, 12) for a in KINDS[1:])])
def test_a_position_sees_none_behind_it_and_no_other_row(activation, T):
    args = tuple(map(f32, qkv(T, 2, 1)))
    attend = partial(ops.attention, scale=0.7, activation=activation, eps=EPS)
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
    attend = partial(ops.attention, scale=1e4, activation="softmax", eps=EPS)
    out, *grads = jax.jit(value_and_grads(attend, 1.0))(q, k, v)
    assert all(np.all(np.isfinite(a)) for a in (out, *grads))


@pytest.mark.parametrize(("n_head", "n_kv", "y"), [(8, 2, 4), (6, 3, 2), (4, 1, 4), (4, 4, 1)])
def test_select_kv(n_head, n_kv, y):
    kv = normal(0, 1, 3, n_kv, 2)
    mesh = make_mesh(MeshConfig(1, y), jax.devices()[:y])
    n_local = n_head // y

    def mine(kv: jax.Array) -> jax.Array:
        selected = ops.select_kv(kv, n_local, n_head)
        return jax.lax.pcast(jnp.repeat(selected, n_local // selected.shape[2], 2), "y", to="varying")

    # All of them are here, on every device: replicated.
    mapped = jax.shard_map(mine, mesh=mesh, in_specs=P(), out_specs=P(None, None, "y"), check_vma=False)
    assert np.array_equal(mapped(f32(kv)), np.repeat(kv, n_head // n_kv, 2).astype(np.float32))


def test_shift_right():
    tokens = jnp.array([[5, 6, 7], [8, 9, 10]])
    assert ops.shift_right(tokens, 3).tolist() == [[3, 5, 6], [3, 8, 9]]
    assert ops.shift_right(tokens, 3, jnp.array([[0, 0, 1], [0, 1, 2]])).tolist() == [[3, 5, 3], [3, 3, 3]]
