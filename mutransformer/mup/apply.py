"""The initial values and the optimizer of any model, by the roles that `infer` found."""

from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakValueDictionary

import equinox as eqx
import jax
import optax

from mutransformer.mup.roles import RoleError, Roles, path_of

# Optimizers whose update does not depend on the scale of the gradient, and those whose update is proportional to it.
_ADAM = (optax.adam, optax.adamw, optax.lion, optax.nadam, optax.nadamw, optax.amsgrad, optax.adabelief, optax.radam)
_SGD = (optax.sgd,)

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
    **settings: Any,
) -> optax.GradientTransformation:
    """An optax optimizer with the rule's learning rate for each weight.

    Args:
        roles: for the size of the model.
        make: optax.adamw, optax.sgd or the like: takes learning_rate and `settings`.
        learning_rate: that of the base model, or a schedule of it.
        rule: a key of RULES without forward multipliers.
        weight_decay: each step removes this times learning_rate of a weight, at all widths alike.
        decay_vectors: gains and biases decay too.
        family: whether the size of an update is free of the gradient's (adam) or proportional to it (sgd); None: known from make.
        settings: further arguments of make.

    Raises:
        RoleError: the family of `make` is not known, the rule has forward multipliers; when the state is made: the roles are for
            another size than the weights.
    """
    kind = family or ("adam" if make in _ADAM else "sgd" if make in _SGD else None)
    if kind is None:
        raise RoleError(f"{make.__name__}: no rule is known for it; give family='adam' or family='sgd' if one of theirs applies")
    factors = roles.factors(rule, sgd=kind == "sgd")
    if make in (optax.adamw, optax.lion, optax.nadamw):
        settings["weight_decay"] = 0.0  # ours is below

    def decays(path: str) -> bool:
        return decay_vectors or roles.leaves[path].role != "vector"

    rates = optax.stateless(lambda updates, _: _map(lambda path, u: u * factors[path].lr, updates))
    core = optax.chain(make(learning_rate=learning_rate, **settings), rates)
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


def _map(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_of(path), leaf), tree)
