"""Parametrizations as data: a weight's initial scale, forward multiplier, learning rate, eps and decay.

All follow from the weight's role and the size of the model. Sizes are global: sharding changes nothing.

    sp            standard: one learning rate
    mup           maximal update, without forward multipliers: Yang et al., Tensor Programs V (arXiv 2203.03466), Table 3, with
                  learning rates relative to a base width: Lingle (arXiv 2404.05728), section 2
    abs_mup       the same with learning rates by fan-in alone
    mup_table8    the same training as mup under Adam, with the unembedding's scale as a multiplier: Tensor Programs V, Table 8
    completep     mup_table8 and a rule for depth: Dey et al. (arXiv 2505.01618), Table 1
    completed_p   mup and rules for depth, batch size and number of tokens: Mlodozeniec et al. (arXiv 2512.22382), Table 1

A new parametrization is a new entry of RULES.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

# residual: hidden, and writes to the residual stream. qk_gain: of the norms of queries and keys. outer_...: not in a layer.
Role = Literal["input", "hidden", "residual", "output", "gain", "qk_gain", "bias", "outer_gain", "outer_bias"]
# rule: the parametrization's own initial scale; else an override. base: as sp at the base width, falling as mup does from there.
Init = Literal["rule", "mup", "base", "sp", "zero"]


@runtime_checkable
class Parameter(Protocol):
    """What the rules need to know about a weight. fan_out is the number of outputs that one input reaches."""

    @property
    def role(self) -> Role: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def fan_in(self) -> int: ...
    @property
    def fan_out(self) -> int: ...
    @property
    def lr_fan_in(self) -> float: ...
    @property
    def is_matrix(self) -> bool: ...
    @property
    def init(self) -> Init: ...
    @property
    def init_tag(self) -> int | None: ...


class LrFactors(NamedTuple):
    """Constant factors on the learning rates of input, hidden (with residual) and output weights, tuned with the rate.

    They do not depend on the model's size, so muP's limits hold for any values.
    """

    input: float = 1.0
    hidden: float = 1.0
    output: float = 1.0

    def of(self, role: Role) -> float:
        """The factor for a role; 1 for gains and biases."""
        return {"input": self.input, "hidden": self.hidden, "residual": self.hidden, "output": self.output}.get(role, 1.0)


@dataclass(frozen=True)
class Scaling:
    """The parametrization of a model, and the size of the model relative to the one that was tuned."""

    rule: str  # a key of RULES
    width: float = 1.0  # d_model / d_base
    depth: float = 1.0  # n_layer / n_layer_base
    batch: float = 1.0  # tokens per step / those of the run that was tuned
    tokens: float = 1.0  # all tokens / those of the run that was tuned
    batch_exponent: float | None = None  # learning rates x batch^batch_exponent; None: as the rule says
    tokens_exponent: float | None = None  # learning rates x tokens^-tokens_exponent; None: as the rule says
    depth_alpha: float = 1.0  # residual branches are multiplied by depth^-depth_alpha (completep, completed_p)
    lr_factors: LrFactors = LrFactors()
    embed_lr_exponent: float = 0.0  # the embedding's learning rate is multiplied by width^embed_lr_exponent
    eps_scaling: bool = False  # eps follows the learning rate's factor
    coupled_decay: bool = False  # weight decay is multiplied by the learning rate
    decay_exponent: float | None = None  # decay of hidden and output matrices x width^decay_exponent; None: as the rule says
    decay_vectors: bool = False  # gains and biases decay too
    muon_lr: float | None = None  # factor on the learning rate of matrices trained by Muon; None: no weight is trained by Muon

    @property
    def parametrization(self) -> "Parametrization":
        return RULES[self.rule]

    @property
    def noise_ratio(self) -> float:
        """The noise of training relative to the run that was tuned: batch / tokens (Mlodozeniec et al., arXiv 2512.22382)."""
        return self.batch / self.tokens

    @property
    def horizon_lr(self) -> float:
        """The factor on all learning rates for batch size and length of training."""
        own = self.parametrization.horizon.lr
        of_batch, of_tokens = (own if given is None else given for given in (self.batch_exponent, self.tokens_exponent))
        return self.batch**of_batch / self.tokens**of_tokens


class Powers(NamedTuple):
    """A product of powers of fan_in, width and depth. The exponent of depth is depth + alpha * depth_alpha."""

    fan_in: float = 0.0
    width: float = 0.0
    depth: float = 0.0
    alpha: float = 0.0

    def __call__(self, fan_in: float, scaling: Scaling) -> float:
        depth = self.depth + self.alpha * scaling.depth_alpha
        return fan_in**self.fan_in * scaling.width**self.width * scaling.depth**depth


ONE = Powers()


class Row(NamedTuple):
    """The rules for the weights of one role."""

    std: Powers | None  # of the normal initial distribution; None: constant, one for gains and zero for biases
    multiplier: Powers = ONE  # on the weight's output in the forward pass; for role residual, on the branch including its bias
    lr: Powers = ONE  # on the base learning rate
    eps: Powers = ONE  # on Adam's eps
    decay: Powers = ONE  # on weight decay that is coupled to the learning rate; independent decay is the same at all sizes


class Horizon(NamedTuple):
    """Exponents of noise_ratio, for all roles: rules for batch size and length of training."""

    lr: float = 0.0
    eps: float = 0.0
    coupled_decay: float = 0.0
    independent_decay: float = 0.0
    beta: float = 0.0  # on 1 - beta


@dataclass(frozen=True)
class Parametrization:
    rows: Mapping[Role, Row]  # one for every role
    horizon: Horizon = Horizon()


_VECTORS: dict[Role, Row] = dict.fromkeys(("gain", "qk_gain", "bias", "outer_gain", "outer_bias"), Row(None))


def _width_rules(hidden: Row, output: Row) -> dict[Role, Row]:
    """Rules for width: they leave the input matrix and vectors alone."""
    return {"input": Row(ONE), "hidden": hidden, "residual": hidden, "output": output, **_VECTORS}


_SQRT, _INVERSE = Powers(fan_in=-0.5), Powers(fan_in=-1.0)
_NARROWER = Powers(width=-1.0)  # P / M: base width / width
# sqrt(P) / M: what microsoft/mup's base shapes give an output layer.
BASE_INIT = Powers(fan_in=-0.5, width=-0.5)
_MUP = _width_rules(Row(_SQRT, lr=_NARROWER), Row(_INVERSE, lr=_NARROWER))
_TABLE8 = _width_rules(Row(_SQRT, lr=_NARROWER), Row(Powers(fan_in=-1.0, width=1.0), multiplier=_NARROWER))

# For the layers, as in both papers on depth. Their decay is coupled and grows with width, so that the amount that one step
# removes does not depend on width.
_EPS = Powers(width=-1.0, alpha=-1.0)
_HIDDEN = Row(_SQRT, lr=Powers(width=-1.0, depth=-1.0, alpha=1.0), eps=_EPS, decay=Powers(width=1.0))
_VECTOR = Row(None, lr=Powers(depth=-1.0, alpha=1.0), eps=_EPS)
_LAYERS: dict[Role, Row] = {
    "hidden": _HIDDEN,
    "residual": _HIDDEN._replace(multiplier=Powers(alpha=-1.0)),
    **dict.fromkeys(("gain", "qk_gain", "bias"), _VECTOR),
}
_COMPLETED_P: dict[Role, Row] = {
    **_MUP,
    **_LAYERS,
    "input": Row(ONE, eps=_NARROWER),
    "output": Row(_INVERSE, lr=_NARROWER, decay=Powers(width=1.0)),
    "qk_gain": _VECTOR._replace(eps=Powers(alpha=-1.0)),
}

RULES: dict[str, Parametrization] = {
    "sp": Parametrization(_width_rules(Row(_SQRT), Row(_SQRT))),
    "mup": Parametrization(_MUP),
    "abs_mup": Parametrization(_width_rules(Row(_SQRT, lr=_INVERSE), Row(_INVERSE, lr=_INVERSE))),
    "mup_table8": Parametrization(_TABLE8),
    "completep": Parametrization({**_TABLE8, **_LAYERS}),
    "completed_p": Parametrization(_COMPLETED_P, Horizon(lr=0.5, eps=-0.5, coupled_decay=0.5, independent_decay=1.0, beta=1.0)),
}


def init_std(w: Parameter, scaling: Scaling) -> float:
    """The standard deviation of the initial values; 0 for gains, biases and where an override says zero."""
    if w.init == "base":
        powers = BASE_INIT
    else:
        rule = scaling.rule if w.init == "rule" else w.init
        powers = None if rule == "zero" else RULES[rule].rows[w.role].std
    return 0.0 if powers is None else powers(float(w.fan_in), scaling)


def forward_multiplier(w: Parameter, scaling: Scaling) -> float:
    """The factor on a weight's output in the forward pass; for role residual, on its branch."""
    return _row(w, scaling).multiplier(float(w.fan_in), scaling)


def lr_multiplier(w: Parameter, scaling: Scaling) -> float:
    """The factor on the base learning rate."""
    return _rule_lr(w, scaling) * scaling.horizon_lr * scaling.lr_factors.of(w.role)


def _rule_lr(w: Parameter, scaling: Scaling) -> float:
    """The rule's factor for width and depth."""
    powers = _row(w, scaling).lr
    if uses_muon(w, scaling):
        assert scaling.muon_lr is not None
        # Updates with a width-independent spectral norm: sqrt(fan_out / fan_in) (Yang et al., arXiv 2310.17813).
        spectral = (w.fan_out / w.fan_in) ** 0.5
        return scaling.muon_lr * spectral * powers._replace(fan_in=0.0, width=0.0)(1.0, scaling)
    own = Powers(width=scaling.embed_lr_exponent if w.role == "input" else 0.0)
    return own(1.0, scaling) * powers(w.lr_fan_in, scaling)


def eps_multiplier(w: Parameter, scaling: Scaling) -> float:
    """The factor on Adam's eps; with eps_scaling the rule's factor on the learning rate, as in the reference system."""
    if scaling.eps_scaling:
        return _rule_lr(w, scaling)
    return _row(w, scaling).eps(float(w.fan_in), scaling) * scaling.noise_ratio**scaling.parametrization.horizon.eps


def decay_multiplier(w: Parameter, scaling: Scaling) -> float:
    """The factor on weight decay; 0 for vectors unless decay_vectors."""
    if not (w.is_matrix or scaling.decay_vectors):
        return 0.0
    horizon = scaling.parametrization.horizon
    powers = _row(w, scaling).decay if scaling.coupled_decay else ONE
    if uses_muon(w, scaling):
        powers = powers._replace(width=0.0)  # it compensates a learning rate that falls with width, which Muon's does not
    if scaling.decay_exponent is not None and w.role in ("hidden", "residual", "output"):
        powers = Powers(width=scaling.decay_exponent)
    exponent = horizon.coupled_decay if scaling.coupled_decay else horizon.independent_decay
    return powers(float(w.fan_in), scaling) * scaling.noise_ratio**exponent


def betas(beta1: float, beta2: float, scaling: Scaling) -> tuple[float, float]:
    """Adam's betas at this batch size and number of tokens."""
    r = scaling.noise_ratio**scaling.parametrization.horizon.beta
    return (beta1, beta2) if r == 1 else (1 - (1 - beta1) * r, 1 - (1 - beta2) * r)


def uses_muon(w: Parameter, scaling: Scaling) -> bool:
    """Whether a weight is trained by Muon: the matrices of the layers, if Muon is the optimizer."""
    return scaling.muon_lr is not None and w.role in ("hidden", "residual")


def _row(w: Parameter, scaling: Scaling) -> Row:
    return scaling.parametrization.rows[w.role]
