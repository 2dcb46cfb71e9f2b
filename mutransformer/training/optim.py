"""The schedule, and the optimizer as an optax chain whose multipliers are read off the weights' specs.

To add an optimizer, add its name to `OptimConfig.name` and its direction to `_direction`. `gradients` expects first moments `mu`.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mutransformer import mup
from mutransformer.config.optim import OptimConfig
from mutransformer.model.weights import Transformer
from mutransformer.mup import Scaling
from mutransformer.sharding.spec import Weight

Schedule = Callable[[Any], Array]


def make_schedule(config: OptimConfig, steps: int) -> Schedule:
    """The learning rate as a fraction of its peak, by completed updates: linear warm-up, then decay to min_lr_ratio."""
    floor, warmup = config.min_lr_ratio, config.warmup(steps)
    decay_steps = max(1, steps - warmup)
    after = {
        "linear": optax.linear_schedule(1.0, floor, decay_steps),
        "cosine": optax.cosine_decay_schedule(1.0, decay_steps, alpha=floor),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]
    joined = optax.join_schedules([optax.linear_schedule(floor, 1.0, max(1, warmup)), after], [warmup])
    return lambda step: jnp.asarray(joined(step), jnp.float32)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer of a run, with everything resolved but the base learning rate."""

    c: OptimConfig
    mu_dtype: str  # of the first moment
    specs: Transformer[Weight]
    scaling: Scaling
    schedule: Schedule  # the learning rate as a fraction of its peak

    def expected_updates(self) -> Transformer[float]:
        """The root mean square of each weight's update, without decay, per unit of base learning rate times schedule, if the
        optimizer's direction is as large as it tends to be at most.

        Its entries are ±1 under Lion, and under Adam once gradients of a weight have one sign. Muon's matrices are orthogonal:
        their root mean square is 1 / sqrt(the larger of fan-in and fan-out).
        """

        def expected(w: Weight) -> float:
            size = max(w.fan_in, w.fan_out) ** -0.5 if mup.uses_muon(w, self.scaling) else 1.0
            return mup.lr_multiplier(w, self.scaling) * size

        return jax.tree.map(expected, self.specs)

    def decay_shares(self) -> Transformer[float]:
        """The share of each weight that weight decay takes away in a step at the peak of the schedule."""

        def share(w: Weight) -> float:
            own = self.c.weight_decay * mup.decay_multiplier(w, self.scaling)
            return own * self.c.lr * mup.lr_multiplier(w, self.scaling) if self.scaling.coupled_decay else own

        return jax.tree.map(share, self.specs)

    def first_moments(self, state: optax.OptState) -> Transformer[Array]:
        """The optimizer's moving averages of the clipped gradients, which are part of its state."""
        directions = cast(Any, state)[1]  # of the chain below
        return eqx.combine(*(each.mu for each in directions)) if self.c.name == "muon" else directions.mu

    def gradients(self, before: Any, after: Any, gradient_norm: Float[Array, ""]) -> Transformer[Array]:
        """The gradients that an update has seen, from the first moments before and after it, and their norm before clipping.

        For looking at a step from outside: a step that returned its gradients would be another program, which may round
        differently.
        """
        c = self.c
        beta1, beta2 = mup.betas(c.beta1, c.beta2, self.scaling)
        own = beta2 if c.name == "lion" else beta1
        unclip = jnp.maximum(1.0, gradient_norm / c.clip_norm) if c.clip_norm else 1.0

        def gradient(w: Weight, old: Array, new: Array) -> Array:
            beta = c.muon_beta if mup.uses_muon(w, self.scaling) else own
            return unclip * (new.astype(jnp.float32) - beta * old.astype(jnp.float32)) / (1 - beta)

        return jax.tree.map(gradient, self.specs, before, after)

    def transformation(self, lr: Float[Array, ""] | float | None = None) -> optax.GradientTransformation:
        """Clip by global norm, direction, learning rates by weight, decay, schedule.

        Updates see global arrays, so norms and moments are exact on any mesh. Coupled decay shrinks a weight by its own learning
        rate times weight_decay, independent decay by weight_decay alone (Wortsman et al., arXiv 2309.14322); both follow the
        schedule. lr replaces the base learning rate of the config, and may be an array.
        """
        c, specs, scaling = self.c, self.specs, self.scaling
        base = c.lr if lr is None else lr
        rates = jax.tree.map(lambda w: base * mup.lr_multiplier(w, scaling), specs)
        decay = jax.tree.map(lambda w: c.weight_decay * mup.decay_multiplier(w, scaling), specs)
        coupled = independent = optax.identity()
        if c.weight_decay and scaling.coupled_decay:
            coupled = _add_weights(decay)
        elif c.weight_decay:
            independent = _add_weights(jax.tree.map(operator.neg, decay))
        return optax.chain(
            optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
            _direction(c, self.mu_dtype, specs, scaling),
            coupled,
            optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: -rate * u, updates, rates)),
            independent,
            optax.scale_by_schedule(self.schedule),
        )


def _add_weights(shares: Transformer[float]) -> optax.GradientTransformation:
    """Adds to every update a share of its weight."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u, p, s: u + s * p if s else u, updates, params, shares))


def _direction(c: OptimConfig, mu_dtype: str, specs: Transformer[Weight], scaling: Scaling) -> optax.GradientTransformation:
    beta1, beta2 = mup.betas(c.beta1, c.beta2, scaling)
    if c.name == "lion":
        return optax.scale_by_lion(beta1, beta2, mu_dtype=mu_dtype)
    eps = jax.tree.map(lambda w: c.eps * mup.eps_multiplier(w, scaling), specs)
    if c.name == "adamw":
        return scale_by_adam(beta1, beta2, eps, mu_dtype)
    by_muon = jax.tree.map(lambda w: mup.uses_muon(w, scaling), specs)
    dims = jax.tree.map(lambda w, chosen: _matrix_dims(w) if chosen else None, specs, by_muon)
    muon = scale_by_muon(beta=c.muon_beta, mu_dtype=mu_dtype, weight_dimension_numbers=dims)
    return _split(by_muon, muon, scale_by_adam(beta1, beta2, eqx.filter(eps, by_muon, inverse=True), mu_dtype))


def scale_by_adam(beta1: float, beta2: float, eps: Any, mu_dtype: str) -> optax.GradientTransformation:
    """optax.scale_by_adam (Kingma and Ba, arXiv 1412.6980) with an eps for each weight: eps is a tree of floats."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(updates, state.mu, beta1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, beta2, 2)
        count = optax.safe_increment(state.count)
        mu_hat, nu_hat = optax.tree.bias_correction(mu, beta1, count), optax.tree.bias_correction(nu, beta2, count)
        updates = jax.tree.map(lambda m, v, e: m / (jnp.sqrt(v) + e), mu_hat, nu_hat, eps)
        return updates, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

    return optax.GradientTransformation(optax.scale_by_adam(mu_dtype=mu_dtype).init, update)


def _split(
    condition: Any, first: optax.GradientTransformation, second: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The first transformation where a tree of bools is true, the second elsewhere. In each one's trees the others are None."""

    def init(params: Any) -> Any:
        ours, theirs = eqx.partition(params, condition)
        return first.init(ours), second.init(theirs)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        ours, theirs = eqx.partition(updates, condition)
        (ours, first_state), (theirs, second_state) = first.update(ours, state[0]), second.update(theirs, state[1])
        return eqx.combine(ours, theirs), (first_state, second_state)

    return optax.GradientTransformation(init, update)


def _matrix_dims(w: Weight) -> MuonDimensionNumbers:
    """Which dims of a stack of layers are contracted and which are produced."""
    dims = [i for i, dim in enumerate(w.dims) if dim.name != "L"]
    first_out = len(w.dims) - w.n_out
    return MuonDimensionNumbers(
        reduction_axis=tuple(i for i in dims if i < first_out), output_axis=tuple(i for i in dims if i >= first_out)
    )
