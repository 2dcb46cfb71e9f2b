"""Each operation gives the numbers and gradients of a plain formula in float64, and a position sees none behind it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mutransformer.config.run import MeshConfig
from mutransformer.model import ops
from mutransformer.sharding.mesh import make_mesh

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
