"""Parametrizations: how initial scale, learning rate and eps of a weight follow from its role and width. One table, as data.

Maximal-update parametrization in the form without forward multipliers (Yang et al., Tensor Programs V, arXiv 2203.03466,
Table 3), with learning rates relative to a base width (Lingle, arXiv 2404.05728, section 2). Widths are global: how a weight is
sharded changes nothing.
"""

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from mutransformer.config import Config
from mutransformer.spec import Role, Weight


@dataclass(frozen=True)
class Scaling:
    """Exponents. std = fan_in^std; learning rate = lr x n^lr, with n as the parametrization says."""

    std: float | None  # None: a constant start, one for gains and zero for biases
    lr: float


@dataclass(frozen=True)
class Parametrization:
    """Attributes:
    relative: n is d_model / d_base, so that at the base width nothing is scaled; else n is the fan-in itself.
    roles: total over the roles.
    """

    relative: bool
    roles: dict[Role, Scaling]


_VECTORS: dict[Role, Scaling] = {"gain": Scaling(None, 0.0), "bias": Scaling(None, 0.0)}
_STANDARD: dict[Role, Scaling] = {
    "input": Scaling(0.0, 0.0),
    "hidden": Scaling(-0.5, 0.0),
    "output": Scaling(-0.5, 0.0),
    **_VECTORS,
}
_MAXIMAL: dict[Role, Scaling] = {
    "input": Scaling(0.0, 0.0),
    "hidden": Scaling(-0.5, -1.0),
    "output": Scaling(-1.0, -1.0),
    **_VECTORS,
}

RULES: dict[str, Parametrization] = {
    "sp": Parametrization(relative=True, roles=_STANDARD),
    "mup": Parametrization(relative=True, roles=_MAXIMAL),
    "abs_mup": Parametrization(relative=False, roles=_MAXIMAL),
}


def init_std(w: Weight, config: Config) -> float:
    """The standard deviation a weight starts with; 0 for gains, biases and where an override says zero."""
    rule = config.optim.rule if w.init == "rule" else w.init
    exponent = None if rule == "zero" else RULES[rule].roles[w.role].std
    return 0.0 if exponent is None else w.fan_in**exponent


def lr_multiplier(w: Weight, config: Config) -> float:
    """The factor on optim.lr."""
    rule, c = RULES[config.optim.rule], config.model
    # Widths as they are meant: neither a ratio of widths nor a fan-in feels that ff_multiple x d_model was rounded.
    if rule.relative:
        n = c.d_model / c.d_base
    else:
        n = c.ff_multiple * c.d_model if any(dim.name == "F" for dim in w.dims[: -w.n_out]) else w.fan_in
    return n ** rule.roles[w.role].lr


def eps_multiplier(w: Weight, config: Config) -> float:
    """The factor on optim.eps: that of the learning rate if optim.eps_scaling, since a gradient shrinks as its rate does."""
    return lr_multiplier(w, config) if config.optim.eps_scaling else 1.0


def decays(w: Weight, config: Config) -> bool:
    return w.is_matrix or config.optim.decay_vectors


def init(specs: Any, config: Config, seed: Int[Array, ""] | int | None = None) -> Any:
    """Draws every weight, float32, whatever the mesh: a weight's key folds in its name, so that no weight moves another's draw.

    Args:
        specs: a tree of Weight.
        config: of the run.
        seed: where it is an array; None: the config's.

    Returns:
        The same tree of arrays.
    """
    root = jax.random.key(config.seed if seed is None else seed)

    def draw(path: tuple, w: Weight) -> Array:
        if w.role == "gain":
            return jnp.ones(w.shape, jnp.float32)
        std = init_std(w, config)
        if std == 0:
            return jnp.zeros(w.shape, jnp.float32)
        key = jax.random.fold_in(root, crc32(jax.tree_util.keystr(path).encode()))
        return std * jax.random.normal(key, w.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, specs)
