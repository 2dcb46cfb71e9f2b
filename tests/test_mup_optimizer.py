"""Optimizers for other people's models: Muon, and constant factors on the learning rates of roles."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from mutransformer import mup
from mutransformer.mup import LrFactors, RoleError

KEY = jax.random.key(0)
infer = partial(mup.infer, base={"width": 32}, other={"width": 48})
exact = optax.contrib.muon


class Blocks(eqx.Module):
    """A feed-forward layer, experts as raw arrays [E, in, out] and as stacked modules, and a convolution."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    raw: Array
    stacked: eqx.nn.Linear
    filters: eqx.nn.Conv1d
    embedding: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __init__(self, width: int):
        keys = jax.random.split(KEY, 7)
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[0])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[1])
        self.raw = jax.random.normal(keys[2], (3, width, 2 * width))
        self.stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(2 * width, width, key=key))(jax.random.split(keys[3], 3))
        self.filters = eqx.nn.Conv1d(width, width, 3, key=keys[4])
        self.embedding = eqx.nn.Embedding(10, width, key=keys[5])
        self.head = eqx.nn.Linear(width, 10, key=keys[6])


def one_update(model: Any, make_optimizer: Callable[..., Any], seed: int = 1) -> tuple[Any, Any]:
    """The first update, for random gradients."""
    params = eqx.filter(model, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    grads = tree.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
    tx = make_optimizer()
    return jax.jit(tx.update)(grads, tx.init(params), params)[0], grads


def test_stacked_modules_keep_the_roles_of_one() -> None:
    roles = infer(Blocks, layout="in_out").at(width=64)
    found = {path: (leaf.role, leaf.outs, leaf.ins) for path, leaf in roles.leaves.items() if leaf.role != "vector"}
    assert found == {
        "up.weight": ("hidden", (0,), (1,)),
        "down.weight": ("hidden", (0,), (1,)),
        "raw": ("hidden", (2,), (1,)),
        "stacked.weight": ("hidden", (1,), (2,)),
        "filters.weight": ("hidden", (0,), (1, 2)),
        "embedding.weight": ("input", (1,), (0,)),
        "head.weight": ("output", (0,), (1,)),
    }
    wide = roles.leaves["stacked.weight"]
    assert (wide.fan_in, wide.fan_out) == (2.0, 2.0) and roles.leaves["stacked.bias"].role == "vector"
    grown = lambda width: eqx.filter_vmap(lambda key: eqx.nn.Linear(8, width, key=key))(jax.random.split(KEY, width))  # noqa: E731
    with pytest.raises(RoleError, match="a dim that stacks layers or experts grows with width"):
        infer(grown)


def test_muons_updates_have_the_spectral_norm_of_the_rule() -> None:
    """Every matrix of a stack by itself; Newton-Schulz leaves singular values between about 0.7 and 1.2."""
    width = 48
    roles = infer(Blocks, layout="in_out").at(width=width)
    updates, _ = one_update(eqx.filter_jit(Blocks)(width), lambda: mup.optimizer(roles, exact, 0.1))
    ratios = {"up": 4.0, "down": 1 / 4, "raw": 2.0, "stacked": 1 / 2, "filters": 1 / 3}
    for name, ratio in ratios.items():
        u = getattr(updates, name)
        u = u if isinstance(u, jax.Array) else u.weight
        matrices = u.reshape(1, width, -1) if name == "filters" else jnp.atleast_3d(u.T).T if u.ndim == 2 else u
        norms = np.linalg.norm(np.asarray(matrices), ord=2, axis=(1, 2))
        assert len(norms) == (3 if name in ("raw", "stacked") else 1)
        assert np.all((norms > 0.1 * ratio**0.5 * 0.65) & (norms < 0.1 * ratio**0.5 * 1.25)), (name, norms)


def test_what_muon_leaves_is_trained_by_adam_under_the_rule() -> None:
    roles = infer(Blocks, layout="in_out").at(width=128)
    model = eqx.filter_jit(Blocks)(128)
    muon, grads = one_update(model, lambda: mup.optimizer(roles, exact, 0.1))
    adam, _ = one_update(model, lambda: mup.optimizer(roles, optax.nadamw, 0.1))
    for where in (lambda m: m.head.weight, lambda m: m.embedding.weight, lambda m: m.up.bias):
        assert np.allclose(where(muon), where(adam), rtol=1e-5)
    assert np.allclose(np.abs(muon.head.weight).mean(), 0.1 / 4 * np.abs(muon.embedding.weight).mean() / 0.1, rtol=0.05)
    assert not np.allclose(muon.up.weight, adam.up.weight, rtol=0.5)


def test_factors_multiply_the_rates_of_their_roles() -> None:
    roles = infer(Blocks, layout="in_out").at(width=64)
    model = eqx.filter_jit(Blocks)(64)
    for make in (optax.sgd, exact):
        plain, _ = one_update(model, lambda make=make: mup.optimizer(roles, make, 0.1))
        scaled, _ = one_update(model, lambda make=make: mup.optimizer(roles, make, 0.1, factors=LrFactors(2.0, 3.0, 4.0)))
        ratios = jax.tree_util.tree_map_with_path(lambda path, a, b: float(jnp.median(b / a)), plain, scaled)
        expected = {"input": 2.0, "hidden": 3.0, "output": 4.0, "vector": 1.0}
        for path, ratio in jax.tree_util.tree_leaves_with_path(ratios):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            assert ratio == pytest.approx(expected[roles.leaves[name].role], rel=1e-5), name


def test_decay_under_muon_is_independent_of_the_rule() -> None:
    roles = infer(Blocks, layout="in_out").at(width=64)
    params = eqx.filter(eqx.filter_jit(Blocks)(64), eqx.is_inexact_array)
    tx = mup.optimizer(roles, exact, 0.5, weight_decay=0.1)
    updates: Any = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]
    assert jnp.allclose(updates.down.weight, -0.05 * params.down.weight) and not updates.up.bias.any()


def test_misuse_of_muon_is_an_error() -> None:
    with pytest.raises(
        RoleError, match=r"^raw of shape \(3, 32, 64\): Muon needs to know its inputs and outputs; give infer a layout"
    ):
        mup.optimizer(infer(Blocks), exact, 0.1)
    cases: list[dict[str, Any]] = [{"consistent_rms": 0.2}, {"adaptive": True}]
    for settings in cases:
        with pytest.raises(RoleError, match=f"^{next(iter(settings))}: not a setting of Muon here"):
            mup.optimizer(infer(Blocks, layout="in_out"), exact, 0.1, **settings)
    with pytest.raises(RoleError, match="lbfgs: no rule is known"):
        mup.optimizer(infer(Blocks), optax.lbfgs, 0.1)
