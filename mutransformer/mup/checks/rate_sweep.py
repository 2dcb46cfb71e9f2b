"""Training of any model at every learning rate, seed and width of a grid.

The runs of one width are one program, compiled once. On accelerators they are vectorized. On a CPU they are computed one after
another within the program: its matrix products are fast for two factors, not for stacks of them.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mutransformer.mup import apply
from mutransformer.mup.checks.runs import Run
from mutransformer.mup.checks.verdict import count, require
from mutransformer.mup.roles import Roles, infer_over

LOGGED = 16  # train losses are means over this many parts of a run
LAST = 0.1  # without validation batches a run's loss is the mean of this last share of its training losses
_log = logging.getLogger(__name__)

Schedule = Callable[[Any], Any]


def sweep(
    make_model: Callable[..., Any],
    loss: Callable[[Any, Any], Any],
    batches: Callable[[int, int], Any] | Iterable[Any],
    widths: Sequence[int],
    lrs: Sequence[float],
    *,
    base: Mapping[str, Any],
    steps: int,
    seeds: Sequence[int] = (0,),
    optimizer: Callable[..., optax.GradientTransformation] = optax.adamw,
    settings: Mapping[str, Any] | None = None,
    rules: Sequence[str] = ("mup", "sp"),
    label: str | None = None,
    schedule: Schedule | None = None,
    validation: Sequence[Any] = (),
    sequential: bool | None = None,
    **inference: Any,
) -> list[Run]:
    """Trains a model by each rule, at every learning rate and seed at each width, on the default device.

    Args:
        make_model: returns the model for the arguments of `base` and `key`. Called outside jit, once for each width and seed.
        loss: of a model on a batch, a scalar in float32. It is vectorized over runs, except on a CPU.
        batches: of (step, seed), a pytree of arrays of equal shapes at all steps; or an iterable of `steps` of them, which every
            width and seed uses. Steps count from 0.
        widths: of the models to train.
        lrs: those of the base model.
        base: the arguments of make_model for the base model. The first is the width.
        steps: updates.
        seeds: of initial values and batches. Equal seeds see the same batches at every width.
        optimizer: as mup.optimizer takes it.
        settings: further arguments of mup.optimizer, as weight_decay, factors, or b2.
        rules: keys of RULES without forward multipliers. The standard parametrization is the control of a transfer report.
        label: follows the rule in the name of the runs, to tell them from those with other settings.
        schedule: the learning rate as a fraction of its peak, by updates completed; None: linear warm-up over the first tenth of
            the steps, then constant.
        validation: batches. A run's loss is the mean over them after the last update. Without them it is the mean of the last
            tenth of the training losses, each taken before the update: as good if no batch comes twice.
        sequential: whether runs are computed one after another or vectorized; None: the former on a CPU.
        inference: further arguments of mup.infer: other, layout, override, constant_init, depth. `other` is one of the widths
            unless given.

    Returns:
        A Run for each rule, width, learning rate and seed, in this order. One whose loss was not finite at some step is diverged.

    Raises:
        CheckError: a list is empty or has a value twice, or there are too few batches.
        RoleError: no width differs from the base; and as infer, init and mup.optimizer.
    """
    name = next(iter(base))
    for what, items in (("widths", widths), ("lrs", lrs), ("seeds", seeds), ("rules", rules)):
        require(len(items) > 0 and len(set(items)) == len(items), f"{what} {list(items)}: must be different, and one at least")
    require(steps > 0 and all(lr > 0 for lr in lrs), "steps and lrs must be above 0")
    roles = infer_over(make_model, base, widths, inference)
    source = batches if callable(batches) else _listed(batches, steps)
    ramp = max(1, steps // 10)
    rates = schedule or (lambda n: jnp.minimum(1.0, (n + 1) / ramp))
    alone = jax.default_backend() == "cpu" if sequential is None else sequential
    points = [(lr, seed) for lr in lrs for seed in seeds]
    runs = []
    for rule, width in itertools.product(rules, widths):
        start, variant = time.monotonic(), f"{rule} {label}" if label else rule
        here = roles.at(**{name: width})
        make = partial(make_model, **{**base, name: width})
        tx = partial(_optimizer, here, optimizer, rates, rule, dict(settings or {}))
        losses, final = _train(make, here, loss, source, lrs, seeds, steps, tx, rule, validation, alone)
        how = {"every": math.ceil(steps / LOGGED), "seconds": (time.monotonic() - start) / len(points), "settings": {}}
        numbers = zip(points, losses, final.tolist(), strict=True)
        found = [Run.of(variant, width, float(lr), seed, of, last, **how) for (lr, seed), of, last in numbers]
        best, diverged = min(found, key=lambda run: run.loss), sum(run.status == "diverged" for run in found)
        text = "%s %s %d: %s in %.1f s, lowest loss %.4f at 2^%.4g, %d diverged"
        spent = time.monotonic() - start
        _log.info(text, variant, name, width, count(len(found), "run"), spent, best.loss, math.log2(best.lr), diverged)
        runs += found
    return runs


def _listed(batches: Iterable[Any], steps: int) -> Callable[[int, int], Any]:
    items = list(islice(batches, steps))
    require(len(items) == steps, f"batches: {len(items)} for {count(steps, 'step')}")
    return lambda step, seed: items[step]


def _optimizer(
    roles: Roles, make: Callable[..., Any], schedule: Schedule, rule: str, settings: Mapping[str, Any], lr: Any
) -> optax.GradientTransformation:
    return apply.optimizer(roles, make, lambda n: lr * schedule(n), rule, **settings)


def _train(
    make: Callable[..., Any],
    roles: Roles,
    loss: Callable[[Any, Any], Any],
    batches: Callable[[int, int], Any],
    lrs: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    make_tx: Callable[[Any], optax.GradientTransformation],
    rule: str,
    validation: Sequence[Any],
    sequential: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Training losses [runs, steps] and final losses [runs], of every learning rate and, within, every seed."""
    models = [apply.init(make(key=jax.random.key(seed)), roles, rule) for seed in seeds]
    params, rest = zip(*(eqx.partition(model, eqx.is_inexact_array) for model in models), strict=True)
    arrays, static = zip(*(eqx.partition(each, eqx.is_array) for each in rest), strict=True)
    fixed = _stack(arrays)
    index = jnp.array([i for _ in lrs for i in range(len(seeds))])
    rates = jnp.array([lr for lr in lrs for _ in seeds], jnp.float32)
    start = _stack([(each, make_tx(1.0).init(each)) for each in params])
    states = jax.tree.map(lambda a: a[index], start)

    def each(function: Callable[[Any], Any], *runs: Any) -> Any:
        return jax.lax.map(function, runs) if sequential else jax.vmap(function)(runs)

    def model_of(weights: Any, seed: Any) -> Any:
        return eqx.combine(weights, jax.tree.map(lambda a: a[seed], fixed), static[0])

    def part(states: Any, first: Any, data: Any) -> Any:
        """Some updates of every run; data [steps of a part, seeds, ...]. Those beyond the last step change nothing."""

        def one(run: Any) -> Any:
            state, lr, seed = run
            tx = make_tx(lr)

            def train(state: Any, batch: Any) -> Any:
                weights, inner = state
                value, grads = jax.value_and_grad(lambda w: loss(model_of(w, seed), batch))(weights)
                updates, inner = tx.update(grads, inner, weights)
                return (eqx.apply_updates(weights, updates), inner), value.astype(jnp.float32)

            def step(state: Any, item: tuple[Any, Any]) -> Any:
                skip = lambda state, batch: (state, jnp.float32(jnp.nan))  # noqa: E731
                return jax.lax.cond(item[0] < steps, train, skip, state, item[1])

            chosen = jax.tree.map(lambda a: a[:, seed], data)
            return jax.lax.scan(step, state, (first + jnp.arange(length), chosen))

        return each(one, states, rates, index)

    length = math.ceil(steps / LOGGED)
    compiled: Any = jax.jit(part, donate_argnums=0)
    losses = []
    for first in range(0, steps, length):
        items = [[batches(min(n, steps - 1), seed) for seed in seeds] for n in range(first, first + length)]
        states, found = compiled(states, jnp.int32(first), _stack([_stack(row, np) for row in items], np))
        losses.append(np.asarray(found))
    table = np.concatenate(losses, axis=1)[:, :steps].astype(np.float64)
    if not validation:
        return table, table[:, -math.ceil(LAST * steps) :].mean(axis=1)
    held = _stack(validation, np)

    def score(run: Any) -> Any:
        model = model_of(*run)
        return jax.lax.map(lambda batch: loss(model, batch), held).mean()

    return table, np.asarray(jax.jit(lambda weights: each(score, weights, index))(states[0]), np.float64)


def _stack(trees: Sequence[Any], xp: Any = jnp) -> Any:
    return jax.tree.map(lambda *leaves: xp.stack(leaves), *trees)
