"""Parametrizations: a weight's start, forward multiplier, learning rate, eps and decay, from its role and the model's size.

One table a parametrization, as data. Sizes are global: how a weight is sharded changes nothing.

    sp            standard: one learning rate
    mup           maximal update, without forward multipliers: Yang et al., Tensor Programs V (arXiv 2203.03466), Table 3, with
                  learning rates relative to a base width: Lingle (arXiv 2404.05728), section 2
    abs_mup       the same with rates by fan-in alone
    mup_table8    the same training as mup under Adam, with the unembedding's scale as a multiplier: Tensor Programs V, Table 8
    completep     mup_table8 and a rule for depth: Dey et al. (arXiv 2505.01618), Table 1
    completed_p   mup and rules for depth, batch size and tokens: Mlodozeniec et al. (arXiv 2512.22382), Table 1
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from mutransformer.config.schema import Config
from mutransformer.sharding.spec import Role, Weight


class Powers(NamedTuple):
    """A product of powers: fan_in of the weight itself; width = d_model / d_base; depth = n_layer / n_layer_base.

    The exponent of depth is depth + alpha x optim.depth_alpha.
    """

    fan_in: float = 0.0
    width: float = 0.0
    depth: float = 0.0
    alpha: float = 0.0

    def __call__(self, fan_in: float, config: Config) -> float:
        m = config.model
        on_width, on_depth = m.d_model / m.d_base, m.n_layer / (m.n_layer_base or m.n_layer)
        depth = self.depth + self.alpha * config.optim.depth_alpha
        return fan_in**self.fan_in * on_width**self.width * on_depth**depth


ONE = Powers()


class Row(NamedTuple):
    """What holds for the weights of a role.

    Attributes:
        std: of the normal start; None for a constant one, one for gains and zero for biases.
        multiplier: on what the weight gives in the forward pass; of role residual, on the branch with its bias.
        lr: on optim.lr.
        eps: on optim.eps.
        decay: on optim.weight_decay where it is coupled to the learning rate. Independent decay is the same at all sizes.
    """

    std: Powers | None
    multiplier: Powers = ONE
    lr: Powers = ONE
    eps: Powers = ONE
    decay: Powers = ONE


class Horizon(NamedTuple):
    """Exponents of (batch ratio / token ratio), for all roles: rules for batch size and length of training."""

    lr: float = 0.0
    eps: float = 0.0
    coupled_decay: float = 0.0
    independent_decay: float = 0.0
    beta: float = 0.0  # on 1 - beta


@dataclass(frozen=True)
class Parametrization:
    rows: Mapping[Role, Row]  # total
    horizon: Horizon = Horizon()


_VECTORS: dict[Role, Row] = dict.fromkeys(("gain", "qk_gain", "bias", "outer_gain", "outer_bias"), Row(None))


def _table(hidden: Row, output: Row) -> dict[Role, Row]:
    """Rules for width: the input matrix and vectors feel nothing of it."""
    return {"input": Row(ONE), "hidden": hidden, "residual": hidden, "output": output, **_VECTORS}


_SQRT, _INVERSE = Powers(fan_in=-0.5), Powers(fan_in=-1.0)
_NARROWER = Powers(width=-1.0)  # P / M
_MUP = _table(Row(_SQRT, lr=_NARROWER), Row(_INVERSE, lr=_NARROWER))
_TABLE8 = _table(Row(_SQRT, lr=_NARROWER), Row(Powers(fan_in=-1.0, width=1.0), multiplier=_NARROWER))

# In the layers, as both papers on depth have it. Their decay is coupled and grows with width: what a step takes away does not.
_HIDDEN = Row(
    _SQRT,
    lr=Powers(width=-1.0, depth=-1.0, alpha=1.0),
    eps=Powers(width=-1.0, alpha=-1.0),
    decay=Powers(width=1.0),
)
_VECTOR = Row(None, lr=Powers(depth=-1.0, alpha=1.0), eps=Powers(width=-1.0, alpha=-1.0))
_LAYERS: dict[Role, Row] = {
    "hidden": _HIDDEN,
    "residual": _HIDDEN._replace(multiplier=Powers(alpha=-1.0)),
    "gain": _VECTOR,
    "qk_gain": _VECTOR,
    "bias": _VECTOR,
}

RULES: dict[str, Parametrization] = {
    "sp": Parametrization(_table(Row(_SQRT), Row(_SQRT))),
    "mup": Parametrization(_MUP),
    "abs_mup": Parametrization(_table(Row(_SQRT, lr=_INVERSE), Row(_INVERSE, lr=_INVERSE))),
    "mup_table8": Parametrization(_TABLE8),
    "completep": Parametrization({**_TABLE8, **_LAYERS}),
    "completed_p": Parametrization(
        {
            **_MUP,
            **_LAYERS,
            "input": Row(ONE, eps=_NARROWER),
            "output": Row(_INVERSE, lr=_NARROWER, decay=Powers(width=1.0)),
            "qk_gain": _VECTOR._replace(eps=Powers(alpha=-1.0)),
        },
        Horizon(lr=0.5, eps=-0.5, coupled_decay=0.5, independent_decay=1.0, beta=1.0),
    ),
}


def init_std(w: Weight, config: Config) -> float:
    """The standard deviation a weight starts with; 0 for gains, biases and where an override says zero."""
    rule = config.optim.rule if w.init == "rule" else w.init
    powers = None if rule == "zero" else RULES[rule].rows[w.role].std
    return 0.0 if powers is None else powers(float(w.fan_in), config)


def multiplier(w: Weight, config: Config) -> float:
    """The factor on what a weight gives in the forward pass; of role residual, on its branch."""
    return _row(w, config).multiplier(float(w.fan_in), config)


def lr_multiplier(w: Weight, config: Config) -> float:
    """The factor on optim.lr."""
    o, powers = config.optim, _row(w, config).lr
    factor = config.noise_ratio ** RULES[o.rule].horizon.lr
    if uses_muon(w, config):
        # Its updates have the spectral norm that lets width be: sqrt(fan_out / fan_in) (Yang et al., arXiv 2310.17813).
        spectral = (w.fan_out / w.fan_in) ** 0.5
        return factor * o.muon_lr * spectral * powers._replace(fan_in=0.0, width=0.0)(1.0, config)
    if w.role == "input":
        factor *= Powers(width=o.embed_lr_exponent)(1.0, config)
    return factor * powers(_fan_in_meant(w, config), config)


def eps_multiplier(w: Weight, config: Config) -> float:
    """The factor on optim.eps; that of the learning rate if optim.eps_scaling, as the reference system has it."""
    if config.optim.eps_scaling:
        return lr_multiplier(w, config)
    return _row(w, config).eps(float(w.fan_in), config) * config.noise_ratio ** RULES[config.optim.rule].horizon.eps


def decay_multiplier(w: Weight, config: Config) -> float:
    """The factor on optim.weight_decay; 0 for vectors unless optim.decay_vectors."""
    o = config.optim
    if not (w.is_matrix or o.decay_vectors):
        return 0.0
    coupled, horizon = o.decay == "coupled", RULES[o.rule].horizon
    powers = _row(w, config).decay if coupled else ONE
    if uses_muon(w, config):
        powers = powers._replace(width=0.0)  # it makes good for a rate that falls with width, and Muon's does not
    if o.decay_exponent is not None and w.role in ("hidden", "residual", "output"):
        powers = Powers(width=o.decay_exponent)
    return powers(float(w.fan_in), config) * config.noise_ratio ** (
        horizon.coupled_decay if coupled else horizon.independent_decay
    )


def betas(config: Config) -> tuple[float, float]:
    """optim.beta1 and beta2, at this batch size and number of tokens."""
    o = config.optim
    r = config.noise_ratio ** RULES[o.rule].horizon.beta
    return (o.beta1, o.beta2) if r == 1 else (1 - (1 - o.beta1) * r, 1 - (1 - o.beta2) * r)


def uses_muon(w: Weight, config: Config) -> bool:
    """Whether a weight is trained by Muon: the matrices of the layers, if optim.name says so."""
    return config.optim.name == "muon" and w.role in ("hidden", "residual")


def _row(w: Weight, config: Config) -> Row:
    return RULES[config.optim.rule].rows[w.role]


def _fan_in_meant(w: Weight, config: Config) -> float:
    """The fan-in as it is meant: a learning rate does not feel that ff_multiple x d_model was rounded."""
    c = config.model
    return c.ff_multiple * c.d_model if any(dim.name == "F" for dim in w.dims[: -w.n_out]) else float(w.fan_in)


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
        if w.role in ("gain", "qk_gain", "outer_gain"):
            return jnp.ones(w.shape, jnp.float32)
        std = init_std(w, config)
        if std == 0:
            return jnp.zeros(w.shape, jnp.float32)
        tag = crc32(jax.tree_util.keystr(path).encode()) if w.init_tag is None else w.init_tag
        key = jax.random.fold_in(root, tag)
        return std * jax.random.normal(key, w.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, specs)
