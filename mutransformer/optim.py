"""The schedule, and the optimizer as an optax chain with muP's multipliers read off the specs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from mutransformer import mup
from mutransformer.config import Config, OptimConfig
from mutransformer.model import Transformer
from mutransformer.spec import Weight

Schedule = Callable[[Any], Array]


def make_schedule(config: OptimConfig, steps: int) -> Schedule:
    """The share of the peak learning rate, by updates completed before: a linear warm-up, then down to the floor at `steps`."""
    floor, warmup = config.schedule_floor, config.warmup_steps
    decay_steps = max(1, steps - warmup)
    after = {
        "linear": optax.linear_schedule(1.0, floor, decay_steps),
        "cosine": optax.cosine_decay_schedule(1.0, decay_steps, alpha=floor),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]
    joined = optax.join_schedules([optax.linear_schedule(floor, 1.0, max(1, warmup)), after], [warmup])
    return lambda step: jnp.asarray(joined(step), jnp.float32)


def make_optimizer(
    config: Config, specs: Transformer[Weight], lr: Float[Array, ""] | float | None = None
) -> optax.GradientTransformation:
    """Clip by global norm, AdamW or Lion, learning rates by weight, decay, schedule.

    Updates see global arrays, so that norms and moments are exact on any mesh. Coupled decay shrinks a weight by its own learning
    rate x weight_decay, independent decay by weight_decay alone (Wortsman et al., arXiv 2309.14322); both follow the schedule.

    Args:
        config: of the run.
        specs: of its weights.
        lr: the base learning rate, where it is an array; None: optim.lr.
    """
    c = config.optim
    base = c.lr if lr is None else lr
    rates = jax.tree.map(lambda w: base * mup.lr_multiplier(w, config), specs)
    mask = jax.tree.map(lambda w: mup.decays(w, config), specs)
    decay = optax.add_decayed_weights(c.weight_decay, mask) if c.weight_decay else optax.identity()
    shrink = optax.add_decayed_weights(-c.weight_decay, mask) if c.weight_decay else optax.identity()
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        _direction(config, specs),
        decay if c.decay == "coupled" else optax.identity(),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: -rate * u, updates, rates)),
        shrink if c.decay == "independent" else optax.identity(),
        optax.scale_by_schedule(make_schedule(c, config.steps)),
    )


def _direction(config: Config, specs: Transformer[Weight]) -> optax.GradientTransformation:
    c, dtype = config.optim, config.precision.moment1
    if c.name == "lion":
        return optax.scale_by_lion(c.beta1, c.beta2, mu_dtype=dtype)
    eps = jax.tree.map(lambda w: c.eps * mup.eps_multiplier(w, config), specs)
    by_eps = {e: optax.scale_by_adam(c.beta1, c.beta2, e, mu_dtype=dtype) for e in set(jax.tree.leaves(eps))}
    return next(iter(by_eps.values())) if len(by_eps) == 1 else optax.partition(by_eps, eps)
