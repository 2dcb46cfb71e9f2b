"""The initial values and the optimizer of any model, by the roles that `infer` found."""

import math
from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakValueDictionary

import equinox as eqx
import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mutransformer.mup.roles import ROWS, Leaf, RoleError, Roles, path_of
from mutransformer.mup.rules import LrFactors

# Optimizers whose update does not depend on the scale of the gradient, and those whose update is proportional to it.
_ADAM = (optax.adam, optax.adamw, optax.lion, optax.nadam, optax.nadamw, optax.amsgrad, optax.adabelief, optax.radam)
_SGD = (optax.sgd,)
# What the rule for Muon decides, or what would make its updates depend on the scale of the gradient.
_NOT_MUONS = ("adam_weight_decay", "adaptive", "consistent_rms", "muon_weight_dimension_numbers", "weight_decay_mask")

SAME = LrFactors()

_rescaled: WeakValueDictionary[int, jax.Array] = WeakValueDictionary()  # what init returned, by id: arrays have no hash


def init(model: Any, roles: Roles, rule: str = "mup") -> Any:
    """Rescales what the model's own initializers drew, so that it starts as the rule says.

    Args:
        model: any pytree of arrays; sharded ones stay as they are.
        roles: for its size.
        rule: a key of RULES without forward multipliers.

    Returns:
        The model with other values; at the base width with the same.

    Raises:
        RoleError: the roles are for another size; a weight was rescaled before; the rule has forward multipliers.
    """
    factors = roles.factors(rule)
    check_fits(model, roles)

    def rescale(path: tuple[Any, ...], w: Any) -> Any:
        name = path_of(path)
        if name not in factors or not eqx.is_inexact_array(w):
            return w
        if _rescaled.get(id(w)) is w:
            raise RoleError(f"{name}: was rescaled by mup.init before")
        scaled = w * factors[name].init
        _rescaled[id(scaled)] = scaled
        return scaled

    return jax.tree_util.tree_map_with_path(rescale, model)


def optimizer(
    roles: Roles,
    make: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    rule: str = "mup",
    weight_decay: float = 0.0,
    decay_vectors: bool = False,
    family: Literal["adam", "sgd"] | None = None,
    factors: LrFactors = SAME,
    **settings: Any,
) -> optax.GradientTransformation:
    """An optax optimizer with the rule's learning rate for each weight.

    With optax.contrib.muon the hidden matrices get updates of a spectral norm of about learning_rate * sqrt(fan-out / fan-in),
    which needs no other rule for width (Yang et al., arXiv 2310.17813). Stacked matrices are orthogonalized one by one. The rest
    is trained by Adam, as optax.contrib.muon does, with the rule's rates for Adam.

    Args:
        roles: for the size of the model.
        make: optax.adamw, optax.sgd, optax.contrib.muon or the like: takes learning_rate and `settings`.
        learning_rate: that of the base model, or a schedule of it.
        rule: a key of RULES without forward multipliers.
        weight_decay: each step removes this times learning_rate of a weight, at all widths alike.
        decay_vectors: gains and biases decay too.
        family: whether the size of an update is free of the gradient's (adam) or proportional to it (sgd); None: known from make.
        factors: constants on the learning rates of input, hidden and output weights, the same at every width.
        settings: further arguments of make.

    Raises:
        RoleError: the family of `make` is not known; the rule has forward multipliers; Muon cannot tell the inputs of a matrix
            from its outputs, or a setting of Muon is the rule's; when the state is made: the roles are for another size.
    """
    by_muon = [leaf for leaf in roles.leaves.values() if make is muon and leaf.role == "hidden"]
    kind = family or ("adam" if make in (*_ADAM, muon) else "sgd" if make in _SGD else None)
    if kind is None:
        raise RoleError(f"{make.__name__}: no rule is known for it; give family='adam' or family='sgd' if one of theirs applies")
    by_rule = roles.factors(rule, sgd=kind == "sgd")
    if make in (optax.adamw, optax.lion, optax.nadamw):
        settings["weight_decay"] = 0.0  # ours is below
    rates = {path: each.lr * factors.of(ROWS[roles.leaves[path].role]) for path, each in by_rule.items()}
    if make is muon:
        if taken := [name for name in _NOT_MUONS if name in settings]:
            raise RoleError(f"{', '.join(taken)}: not a setting of Muon here: it is the rule's")
        sides = {leaf.path: _sides(leaf) for leaf in by_muon}
        dims = {path: MuonDimensionNumbers(ins, outs) for path, (ins, outs) in sides.items()}
        settings["muon_weight_dimension_numbers"] = lambda params: _map(lambda path, _: dims.get(path), params)
        rates |= {leaf.path: factors.hidden * _spectral(leaf.shape, *sides[leaf.path]) for leaf in by_muon}

    def decays(path: str) -> bool:
        return decay_vectors or roles.leaves[path].role != "vector"

    scale = optax.stateless(lambda updates, _: _map(lambda path, u: u * rates[path], updates))
    core = optax.chain(make(learning_rate=learning_rate, **settings), scale)
    decay = optax.chain(
        optax.stateless(lambda _, params: _map(lambda path, w: w * weight_decay if decays(path) else 0 * w, params)),
        optax.scale_by_learning_rate(learning_rate),
    )

    def start(params: Any) -> Any:
        check_fits(params, roles)
        return core.init(params), decay.init(params) if weight_decay else None

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved, first = core.update(updates, state[0], params)
        if not weight_decay:
            return moved, (first, None)
        shrunk, second = decay.update(updates, state[1], params)
        return jax.tree.map(lambda a, b: a + b, moved, shrunk), (first, second)

    return optax.GradientTransformation(start, update)


def check_fits(tree: Any, roles: Roles) -> None:
    """Raises RoleError unless the weights of a model are those that the roles are for, in number and shape."""
    found = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if eqx.is_inexact_array(leaf)}
    wrong = [path for path in sorted(found.keys() | roles.leaves.keys()) if path not in roles.leaves or path not in found]
    if wrong:
        raise RoleError(f"the roles and the model differ in weights: {', '.join(wrong)}")
    for path, shape in found.items():
        expected = roles.leaves[path].shape
        if tuple(shape) != expected:
            raise RoleError(f"{path}: has shape {tuple(shape)}, but the roles are for {expected}: use roles.at(...)")


def _sides(leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which dims of a hidden weight are the inputs and which the outputs of a matrix; the others stack matrices."""
    ins, outs = leaf.ins, leaf.outs
    growing = tuple(i for i, grows in enumerate(leaf.grows) if grows and not leaf.stacked[i])
    if not outs and len(growing) == 2 and leaf.shape[growing[0]] == leaf.shape[growing[1]]:
        ins, outs = growing[:1], growing[1:]  # either way: a matrix that is orthogonalized is as well if transposed
    if not outs:
        raise RoleError(f"{leaf.path} of shape {leaf.shape}: Muon needs to know its inputs and outputs; give infer a layout")
    return ins, outs


def _spectral(shape: tuple[int, ...], ins: tuple[int, ...], outs: tuple[int, ...]) -> float:
    """What takes optax's factor on the orthogonalized update, sqrt(max(1, fan-out / fan-in)), to sqrt(fan-out / fan-in)."""
    fan_in, fan_out = (math.prod(shape[i] for i in axes) for axes in (ins, outs))
    return math.sqrt(min(1.0, fan_out / fan_in))


def _map(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_of(path), leaf), tree)
