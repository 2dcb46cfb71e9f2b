"""The coordinate check of any model: how its activations, their changes and its updates scale with width.

As for this project's own Transformer (Yang et al., arXiv 2203.03466, appendix D.1): in a parametrization that transfers, mean |x|
of every activation, and of its change since the start, is independent of width after a few steps. The standard parametrization
runs beside it and must fail. Activations are what `intermediates.products` finds in the loss.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from optax.contrib import muon

from mutransformer.mup.apply import init
from mutransformer.mup.apply import optimizer as make_optimizer
from mutransformer.mup.checks.intermediates import Product, is_data, products
from mutransformer.mup.checks.slopes import (
    MAX_SLOPE,
    UPDATES,
    Coordinate,
    Expected,
    Kind,
    SlopeFit,
    csv_text,
    fit_slopes,
    judge,
    slope_table,
)
from mutransformer.mup.checks.verdict import Verdict, passed, require
from mutransformer.mup.roles import Roles, infer_over, path_of

_CONTROL = "sp"


@dataclass(frozen=True)
class CoordinateReport:
    """What a coordinate check measured and concluded. `print` shows the verdicts and the slopes.

    Attributes:
        coordinates: every measured number. Variants are the keys of RULES.
        expected: the slopes of muP.
        fits: a slope over width for each variant, kind, name and step.
        verdicts: on the rule, and on the control.
    """

    coordinates: list[Coordinate]
    expected: Expected
    fits: list[SlopeFit]
    verdicts: list[Verdict]

    @property
    def passed(self) -> bool:
        """Whether the slopes are as expected, and the control's changes grow."""
        return passed(self.verdicts)

    def csv(self) -> str:
        """Every measured number, one to a line, below a line of column names."""
        return csv_text(self.coordinates)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.verdicts), "", slope_table(self.fits, "width")])


def coord_check(
    make_model: Callable[..., Any],
    loss: Callable[[Any, Any], Any],
    batch: Any,
    widths: Sequence[int],
    *,
    base: Mapping[str, Any],
    seeds: int | Sequence[int] = 3,
    steps: int = 10,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
    learning_rate: float = 2**-10,
    settings: Mapping[str, Any] | None = None,
    rule: str = "mup",
    max_slope: float = MAX_SLOPE,
    **inference: Any,
) -> CoordinateReport:
    """Trains a model at several widths on one batch, and judges how what its loss computes scales with width.

    Recorded is mean |x| of every product that the loss computes from the batch ("size"; `intermediates.products` says which, and
    how they are named), of what training has changed it by ("change"), and of each update of each weight ("update").
    All is computed on the default device. A program is compiled for each width and rule.

    Args:
        make_model: returns the model, any pytree, for the arguments of `base` and `key`, a random key. Called outside jit.
        loss: of a model on a batch, a scalar. What it draws at random for activations must come from keys in the batch.
        batch: any pytree of arrays and static values, the same at every step; or a function of the seed that returns one.
        widths: of the models to train: at least two, none below the base's.
        base: the arguments of make_model for the base model. The first is the width.
        seeds: of initial values and batches: a list, or how many, from 0.
        steps: updates, at least 2.
        optimizer: optax.adam, or a relative whose updates do not depend on the scale of the gradient.
        learning_rate: that of the base model. At a high one the control's activations saturate before they have grown.
        settings: further arguments of mup.optimizer, as family, factors, or b2.
        rule: a key of RULES without forward multipliers. Its control is sp; sp itself has none.
        max_slope: the largest difference from an expected slope that passes, two standard errors allowed for.
        inference: further arguments of mup.infer: other, layout, override, constant_init, depth. `other` is one of the widths
            unless given.

    Raises:
        CheckError: a setting cannot be used, or the loss is not a scalar, computes no product, or others at another width.
        RoleError: as infer, init and mup.optimizer.
    """
    options, sizes = dict(settings or {}), sorted(set(widths))
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    (name, base_width), *_ = base.items()
    require(len(sizes) > 1, f"widths {list(widths)}: at least two different ones are needed")
    require(sizes[0] >= base_width, f"widths: {sizes[0]} is below that of the base, {name}={base_width}")
    require(len(set(seeds)) == len(seeds) > 0, f"seeds {seeds}: must be different, and one at least")
    require(steps > 1, f"steps {steps}: must be at least 2")
    known = optimizer not in (optax.sgd, muon) and options.get("family") != "sgd"
    require(known, "optimizer: must be optax.adam or one of its relatives, whose updates are as large as the learning rate")

    data, static = _batches(batch, seeds)
    of = lambda model, data: loss(model, eqx.combine(data, static))  # noqa: E731
    at_base = infer_over(make_model, base, sizes, inference)
    roles = {size: at_base.at(**{name: size}) for size in sizes}
    makes = {size: partial(make_model, **{**base, name: size}) for size in sizes}
    first = jax.tree.map(lambda x: x[0], data)
    found = {size: _products(makes[size], of, first) for size in sizes}
    expected = _expected(roles, found)
    order = [*found[sizes[0]], *at_base.leaves]

    variants, coordinates = list(dict.fromkeys((rule, _CONTROL))), list[Coordinate]()
    for size in sizes:
        models = [makes[size](key=jax.random.key(seed)) for seed in seeds]
        for variant in variants:
            updates = make_optimizer(roles[size], optimizer, learning_rate, variant, **options)
            started = [init(model, roles[size], variant) for model in models]
            for (kind, what, step), values in _numbers(_train(started, of, data, updates, steps), order):
                coordinates += [Coordinate(variant, size, s, step, kind, what, v) for s, v in zip(seeds, values, strict=True)]
    fits = fit_slopes(coordinates)
    control = _CONTROL if rule != _CONTROL else None
    return CoordinateReport(coordinates, expected, fits, judge(fits, expected, rule, control, "width", max_slope))


def _batches(batch: Any, seeds: Sequence[int]) -> tuple[Any, Any]:
    """The arrays of the batches, stacked over seeds, and what else is in them."""
    split = [eqx.partition(batch(seed) if callable(batch) else batch, is_data) for seed in seeds]
    shapes = [(jax.tree.structure(data), [jnp.shape(x) for x in jax.tree.leaves(data)]) for data, _ in split]
    require(all(each == shapes[0] for each in shapes), "batch: must have the same arrays, of the same shapes, for every seed")
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *(data for data, _ in split)), split[0][1]


def _products(make: Callable[..., Any], loss: Callable[[Any, Any], Any], data: Any) -> dict[str, Product]:
    """The products by name, in program order, as shapes. Nothing is computed."""
    model = eqx.filter_eval_shape(make, key=jax.random.key(0))
    value = eqx.filter_eval_shape(loss, model, data)
    scalar = isinstance(value, jax.ShapeDtypeStruct) and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)
    require(scalar, f"loss: must return a scalar, not {value}")
    _, found = eqx.filter_eval_shape(products, loss, model, data)
    require(len(found) > 0, "loss: computes no product of the batch, or of what depends on it, with a weight")
    return {each.name: each for each in found}


def _expected(roles: Mapping[int, Roles], found: Mapping[int, Mapping[str, Product]]) -> Expected:
    """Of mup, whatever the rule. Sizes are flat, but for those of outputs: products without a growing dim.

    If the weight of an output grows, it starts with a std of 1 / fan-in, hence the output with a size of fan-in^-1/2. If an
    output is the product of two activations, its size depends on whether they are independent.
    """
    sizes = list(roles)
    narrow, wide = found[sizes[0]], found[sizes[-1]]
    for size in sizes[1:]:
        differing = sorted(found[size].keys() ^ narrow.keys())
        require(not differing, f"loss: {', '.join(differing)}: computed at one of the widths {sizes[0]} and {size} only")
    leaves = {path: [roles[size].leaves[path] for size in sizes] for path in roles[sizes[0]].leaves}
    by_fan_in = {path: _exponent(sizes, [leaf.fan_in for leaf in each]) for path, each in leaves.items()}
    update = {path: UPDATES.get(each[0].role, 0.0) * by_fan_in[path] for path, each in leaves.items()}
    growth = {path: _exponent(sizes, [math.prod(leaf.shape) for leaf in each]) for path, each in leaves.items()}
    outputs = {name: each.weights for name, each in narrow.items() if each.array.shape == wide[name].array.shape}
    fan_in = {name: max((growth[path] for path in weights), default=0.0) for name, weights in outputs.items()}
    start = {name: -0.5 * exponent for name, exponent in fan_in.items() if exponent > 0}
    return Expected(start=start, update=update, readouts=frozenset(outputs.keys() - start.keys()))


def _exponent(sizes: Sequence[int], values: Sequence[float] | Sequence[int]) -> float:
    return round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 6) + 0.0  # -0.0 + 0.0 is 0.0


def _train(
    models: Sequence[Any],
    loss: Callable[[Any, Any], Any],
    data: Any,
    updates: optax.GradientTransformation,
    steps: int,
) -> dict[Kind, dict[str, Array]]:
    """One run for each model and its batch, one after another. Sizes are [runs, steps + 1], changes and updates [runs, steps]."""
    split = [eqx.partition(model, eqx.is_array) for model in models]
    fixed = split[0][1]

    def run(item: tuple[Any, Any]) -> dict[Kind, dict[str, Array]]:
        initial, rest = eqx.partition(item[0], eqx.is_inexact_array)

        def model(weights: Any) -> Any:
            return eqx.combine(weights, rest, fixed)

        def measured(weights: Any) -> dict[str, Array]:
            return {each.name: each.array for each in products(loss, model(weights), item[1])[1]}

        def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], dict[Kind, dict[str, Array]]]:
            weights, state = carry
            gradient = jax.grad(lambda weights: loss(model(weights), item[1]))(weights)
            moves, state = updates.update(gradient, state, weights)
            moved: Any = optax.apply_updates(weights, moves)
            pairs = zip(jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(weights), strict=True)
            now = measured(moved)
            return (moved, state), {
                "size": {name: _mean_abs(x) for name, x in now.items()},
                "change": {name: _mean_abs(x, before[name]) for name, x in now.items()},
                "update": {path_of(path): _mean_abs(w, old) for (path, w), old in pairs},
            }

        found: dict[Kind, dict[str, Array]]
        before = measured(initial)
        _, found = jax.lax.scan(step, (initial, updates.init(initial)), length=steps)
        sizes = {name: jnp.concatenate([_mean_abs(before[name])[None], x]) for name, x in found["size"].items()}
        return {**found, "size": sizes}

    arrays = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each for each, _ in split))
    return jax.jit(partial(jax.lax.map, run))((arrays, data))


def _mean_abs(x: Array, less: Array | float = 0.0) -> Array:
    return jnp.mean(jnp.abs(jnp.asarray(x, jnp.float32) - jnp.asarray(less, jnp.float32)))


def _numbers(
    found: Mapping[Kind, Mapping[str, Array]], order: Sequence[str]
) -> Iterator[tuple[tuple[Kind, str, int], list[float]]]:
    """By kind, name and step: a number for each seed. Names in this order, which JAX does not keep."""
    for kind, of_kind in found.items():
        for name in sorted(of_kind, key=order.index):
            for i, by_seed in enumerate(np.asarray(of_kind[name]).T.tolist()):
                yield (kind, name, i + (kind != "size")), by_seed
