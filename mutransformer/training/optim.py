"""The schedule, and the optimizer as an optax chain with muP's multipliers read off the specs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mutransformer.config.schema import Config, OptimConfig
from mutransformer.model.transformer import Transformer
from mutransformer.mup import rules as mup
from mutransformer.sharding.spec import Weight

Schedule = Callable[[Any], Array]


def make_schedule(config: OptimConfig, steps: int) -> Schedule:
    """The share of the peak learning rate, by updates completed before: a linear warm-up, then down to the floor at `steps`."""
    floor, warmup = config.min_lr_ratio, config.warmup_steps
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
    """Clip by global norm, AdamW, Lion or Muon, learning rates by weight, decay, schedule.

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
    decay = _decay(jax.tree.map(lambda w: c.weight_decay * mup.decay_multiplier(w, config), specs))
    shrink = _decay(jax.tree.map(lambda w: -c.weight_decay * mup.decay_multiplier(w, config), specs))
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        _direction(config, specs),
        decay if c.weight_decay and c.decay == "coupled" else optax.identity(),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: -rate * u, updates, rates)),
        shrink if c.weight_decay and c.decay == "independent" else optax.identity(),
        optax.scale_by_schedule(make_schedule(c, config.steps)),
    )


def _decay(shares: Transformer[float]) -> optax.GradientTransformation:
    """Adds to every update a share of the weight."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u, p, s: u + s * p if s else u, updates, params, shares))


def _direction(config: Config, specs: Transformer[Weight]) -> optax.GradientTransformation:
    """The optimizer proper, a transformation per weight: a label tells which."""
    c, dtype, (beta1, beta2) = config.optim, config.precision.mu_dtype, mup.betas(config)
    if c.name == "lion":
        return optax.scale_by_lion(beta1, beta2, mu_dtype=dtype)

    eps = jax.tree.map(lambda w: c.eps * mup.eps_multiplier(w, config), specs)
    labels = jax.tree.map(lambda w, e: "muon" if mup.uses_muon(w, config) else f"adam, eps {e:.17g}", specs, eps)
    kinds = {
        label: optax.scale_by_adam(beta1, beta2, e, mu_dtype=dtype)
        for label, e in zip(jax.tree.leaves(labels), jax.tree.leaves(eps), strict=True)
    }
    if c.name == "muon":
        # The other weights are masked out of its tree. A stack of layers is a stack of matrices.
        dims = jax.tree.map(lambda w: _matrix_dims(w) if mup.uses_muon(w, config) else optax.MaskedNode(), specs)
        kinds["muon"] = scale_by_muon(beta=c.muon_beta, mu_dtype=dtype, weight_dimension_numbers=lambda _: dims)
    return next(iter(kinds.values())) if len(kinds) == 1 else optax.partition(kinds, labels)


def _matrix_dims(w: Weight) -> MuonDimensionNumbers:
    n, into = len(w.dims), [i for i, dim in enumerate(w.dims) if dim.name != "L"]
    split = n - w.n_out
    return MuonDimensionNumbers(
        reduction_axis=tuple(i for i in into if i < split), output_axis=tuple(i for i in into if i >= split)
    )
