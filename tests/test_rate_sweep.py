"""Sweeps of other people's models: the same runs as training each one alone, in either layout, and the report on them."""

import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from sweeps import RATES, sweep

from mutransformer import mup
from mutransformer.mup.checks.rate_sweep import LOGGED
from mutransformer.mup.checks.verdict import CheckError
from mutransformer.mup.roles import RoleError
from mutransformer.mup.rules import LrFactors

STEPS, SEEDS, LRS = 20, (3, 5), (2.0**-8, 2.0**-6)
Pair = tuple[Array, Array]


class Permuted(eqx.Module):
    """An MLP behind a permutation that depends on the key, as flows have: an array that is not trained."""

    order: Array
    mlp: eqx.nn.MLP

    def __init__(self, width: int, key: Array):
        self.order = jax.random.permutation(key, 6)
        self.mlp = eqx.nn.MLP(6, 2, width, 2, key=key)


@jax.jit
def batch(step: Any, seed: Any) -> Pair:
    x = jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), (16, 6))
    return x, jnp.stack([x[:, 0] * x[:, 1], jnp.sin(x[:, 2])], axis=1)


def loss(model: Permuted, batch: Pair) -> Array:
    x, y = batch
    return jnp.mean((jax.vmap(model.mlp)(x[:, model.order]) - y) ** 2)


swept = partial(mup.sweep, Permuted, base={"width": 8}, steps=STEPS, rules=("mup",))


def alone(width: int, lr: float, seed: int, rule: str) -> tuple[list[float], Permuted]:
    """Training with the public functions, step by step."""
    make = partial(Permuted, key=jax.random.key(seed))
    roles = mup.infer(make, {"width": 8}, {"width": 12}).at(width=width)
    model = mup.init(make(width), roles, rule)
    rate = lambda n: lr * jnp.minimum(1.0, (n + 1) / (STEPS // 10))  # noqa: E731
    tx = mup.optimizer(roles, optax.adamw, rate, rule, weight_decay=0.1, factors=LrFactors(output=2.0))
    state, losses = tx.init(eqx.filter(model, eqx.is_inexact_array)), []

    @eqx.filter_jit
    def step(model: Any, state: Any, data: Pair) -> Any:
        value, grads = eqx.filter_value_and_grad(loss)(model, data)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    for n in range(STEPS):
        model, state, value = step(model, state, batch(n, seed))
        losses.append(float(value))
    return losses, model


@pytest.mark.parametrize("sequential", [True, False])
def test_a_run_of_a_sweep_is_the_run_alone(sequential: bool) -> None:
    held = [batch(n, 77) for n in range(3)]
    settings = {"weight_decay": 0.1, "factors": LrFactors(output=2.0)}
    runs = swept(loss, batch, [8, 24], LRS, seeds=SEEDS, settings=settings, sequential=sequential, validation=held)
    assert [r.key for r in runs] == [("mup", width, lr, seed) for width in (8, 24) for lr in LRS for seed in SEEDS]
    for r in (runs[1], runs[6]):
        losses, model = alone(r.width, r.lr, r.seed, "mup")
        length = -(-STEPS // LOGGED)
        assert r.logged == [*range(length, STEPS, length), STEPS] and r.status == "finished" and r.diverged_at is None
        assert np.allclose(np.array(r.train_loss, float), np.array(losses).reshape(-1, length).mean(axis=1), rtol=1e-4)
        assert r.validation_loss == pytest.approx(np.mean([float(loss(model, each)) for each in held]), rel=1e-4)
    assert len({r.loss for r in runs}) == len(runs)


def test_without_validation_the_last_training_losses_count_and_a_list_serves_as_batches() -> None:
    items = [batch(n, 9) for n in range(STEPS)]
    (r,) = swept(loss, iter(items), [12], [2.0**-7])
    (s,) = swept(loss, lambda n, seed: items[n], [12], [2.0**-7])
    assert r.train_loss == s.train_loss and r.validation_loss == pytest.approx(r.train_loss[-1])


def test_the_standard_parametrization_is_trained_beside() -> None:
    """As the control of a transfer report; a label tells sweeps with other settings apart, and keeps the control one."""
    once = partial(mup.sweep, Permuted, loss, batch, [8, 16], [2.0**-7], base={"width": 8}, steps=2)
    plain, named = once(), once(label="slow", settings={"weight_decay": 0.1})
    assert [(run.variant, run.width) for run in plain] == [("mup", 8), ("mup", 16), ("sp", 8), ("sp", 16)]
    assert [run.variant for run in named] == ["mup slow"] * 2 + ["sp slow"] * 2
    assert plain[1].loss != plain[3].loss


def test_divergence_is_recorded() -> None:
    explosive = lambda model, data: loss(model, data) * jnp.exp(jnp.sum(model.mlp.layers[1].weight ** 2))  # noqa: E731
    runs = swept(explosive, batch, [8, 16], [2.0**-9, 2.0**4])
    assert [r.status for r in runs] == ["finished", "diverged"] * 2
    bad = runs[1]
    assert bad.diverged_at and bad.train_loss[-1] is None and bad.loss == np.inf and bad.validation_loss is None
    assert bad.train_loss[(bad.diverged_at - 1) // 2] is None


def test_misuse_is_an_error() -> None:
    with pytest.raises(RoleError, match="^no width differs from the base's, width=8: give other$"):
        swept(loss, batch, [8], LRS)
    with pytest.raises(CheckError, match=r"^seeds \[1, 1\]: must be different"):
        swept(loss, batch, [8, 16], LRS, seeds=[1, 1])
    with pytest.raises(CheckError, match="^batches: 2 for 20 steps$"):
        swept(loss, [batch(0, 0)] * 2, [8, 16], LRS)
    with pytest.raises(CheckError, match="^max_drift -1.0: must be 0 or more"):
        mup.transfer_report([], max_drift=-1.0)


def test_the_report_passes_what_transfers_and_fails_what_does_not() -> None:
    stays, moves = (lambda width: -6.2), (lambda width: -6.2 - math.log2(width / 64))
    good = mup.transfer_report(sweep("mup", stays) + sweep("sp", moves))
    assert good.passed and any(v.outcome == "CONTROL" and "does not transfer" in v.text for v in good.verdicts)
    lines = str(good).splitlines()
    (row,) = (line.split() for line in lines if line.startswith("64 ") and lines.index(line) < lines.index("sp (control)"))
    assert sum(cell.endswith("*") for cell in row) == 1 and len(row) > len(RATES)
    bad = mup.transfer_report(sweep("mup", moves) + sweep("sp", moves))
    assert not bad.passed and bad.verdicts[0].outcome == "FAIL"
