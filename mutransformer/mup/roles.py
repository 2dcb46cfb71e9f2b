"""muP for any model: the role of each weight, inferred from how its shape grows with width, and what follows from it.

Pure data: nothing is attached to arrays or modules, so jit, sharding and checkpoints cannot lose it. Only the shapes of the
model are read. Where they and its modules do not tell a role, an error names the weight, and `override` gives the role.

All factors are relative to the base model, at which they are 1: there the model trains as it did before. They are powers of the
ratio of a weight's fan-in to that of the base model, with the exponents of `RULES` (Yang et al., arXiv 2203.03466, Table 3).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from mutransformer.mup.rules import ONE, RULES, Powers, Role
from mutransformer.mup.text import aligned

# vector: gains and biases. fixed: no dim of it grows with width.
LeafRole = Literal["input", "hidden", "output", "vector", "fixed"]
Layout = Literal["out_in", "in_out"]
Initializers = Literal["fan_in", "constant"]

_OUT_IN = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.GRUCell, eqx.nn.LSTMCell)
_NORMS = (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm, eqx.nn.PReLU)
_BIASES = ("bias", "bias_n")
# The row of a parametrization for each role.
ROWS: dict[LeafRole, Role] = {"input": "input", "hidden": "hidden", "output": "output", "vector": "gain", "fixed": "gain"}


class RoleError(ValueError):
    """The role of a weight cannot be inferred, or the roles do not fit the model, the rule or the optimizer."""


class Factors(NamedTuple):
    """What a weight's initial values and its learning rate are multiplied by."""

    init: float
    lr: float


@dataclass(frozen=True)
class Leaf:
    """One weight.

    Attributes:
        path: with dots: layers.0.weight.
        shape: in the model at hand.
        base: its shape in the base model.
        grows: for each dim, whether it grows with width.
        stacked: for each dim, whether it grows with depth, as the layers of a scan do.
        outs: the dims of its outputs, empty if they are not known. Dims of neither side stack layers or experts.
        ins: likewise, of its inputs.
        role: which row of a parametrization applies.
        fan_in: ratio of its fan-in to the base model's; of a bias, that of its layer.
        fan_out: likewise, of its outputs.
        initializers: whether its own initial values have a std of fan-in^-1/2 times a constant, or a constant std.
        why: the reason for the role.
    """

    path: str
    shape: tuple[int, ...]
    base: tuple[int, ...]
    grows: tuple[bool, ...]
    stacked: tuple[bool, ...]
    outs: tuple[int, ...]
    ins: tuple[int, ...]
    role: LeafRole
    fan_in: float
    fan_out: float
    initializers: Initializers
    why: str

    def factors(self, rule: str, sgd: bool = False) -> Factors:
        """By a parametrization of RULES.

        SGD's learning rates are those of the same table: they grow with the fan-out of inputs and vectors.
        """
        row = RULES[rule].rows[ROWS[self.role]]
        own = -0.5 if self.initializers == "fan_in" else 0.0
        init = 1.0
        if row.std is not None:
            init = _relative(row.std, self.fan_in) / self.fan_in**own
        elif rule != "sp" and self.role == "vector":
            init = self.fan_in**-own  # a bias that its layer draws with a std of fan-in^-1/2 stays as large as at the base
        lr = _relative(row.lr, self.fan_in)
        if sgd and rule != "sp":
            lr = {"hidden": self.fan_out / self.fan_in, "output": 1 / self.fan_in}.get(self.role, self.fan_out)
        return Factors(init, lr)


@dataclass(frozen=True)
class Roles:
    """The roles of a model's weights, for the size at hand. `at` gives those for another size.

    Attributes:
        leaves: by path.
    """

    leaves: Mapping[str, Leaf]
    _infer: Callable[..., "Roles"]

    def at(self, **sizes: Any) -> "Roles":
        """The roles of make_model(**base, **sizes)."""
        return self._infer(sizes)

    def factors(self, rule: str = "mup", sgd: bool = False) -> dict[str, Factors]:
        """By path. Raises RoleError if the rule has multipliers in the forward pass, which only the model can apply."""
        if rule not in RULES:
            raise RoleError(f"rule {rule}: must be one of {', '.join(RULES)}")
        if any(row.multiplier != ONE for row in RULES[rule].rows.values()):
            raise RoleError(f"rule {rule} multiplies in the forward pass, which only the model itself can do; use mup")
        return {path: leaf.factors(rule, sgd) for path, leaf in self.leaves.items()}

    def table(self, rule: str = "mup", sgd: bool = False) -> str:
        """A line for each weight: path, shape (* grows with width, L with depth), role, factors, reason."""
        rows: list[tuple[str, ...]] = [("weight", "shape", "role", "init x", "lr x", "because")]
        for path, each in self.factors(rule, sgd).items():
            leaf = self.leaves[path]
            marks = ["*" if g else "L" if s else "" for g, s in zip(leaf.grows, leaf.stacked, strict=True)]
            shape = " ".join(f"{n}{mark}" for n, mark in zip(leaf.shape, marks, strict=True))
            rows.append((path, shape, leaf.role, *(f"{factor:.4g}" for factor in each), leaf.why))
        return aligned(rows)


def infer(
    make_model: Callable[..., Any],
    base: Mapping[str, Any],
    other: Mapping[str, Any],
    depth: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
    layout: Layout | None = None,
    override: Mapping[str, LeafRole] | None = None,
    constant_init: frozenset[str] | set[str] = frozenset(),
) -> Roles:
    """Finds the role of every weight of a model from its shapes at two widths. Nothing is allocated.

    Args:
        make_model: returns the model, any pytree, for keyword arguments. Give it a key with functools.partial if it needs one.
        base: the arguments of the base model, for which the learning rate is tuned.
        other: the arguments that make another width, not a multiple of the base's: a dim that is equal by chance does not grow.
        depth: two sets of arguments that differ in the number of layers: finds the dims of stacked layers.
        layout: whether the dims of arrays that no known module owns are outputs first or inputs first.
        override: roles by path, for what cannot be inferred or is meant otherwise.
        constant_init: paths of weights whose own initial std does not fall with their fan-in (embeddings' never does).

    Returns:
        The roles at the base: all factors are 1. `roles.at(width=1024)` gives those of a model to train.

    Raises:
        RoleError: a role is ambiguous, a path in override or constant_init does not exist, or no weight grows.
    """
    override = dict(override or {})
    widths = [key for key in {**base, **other} if base.get(key) != other.get(key)]

    def at(sizes: Mapping[str, Any]) -> Roles:
        model = {**base, **sizes}
        narrow, wide = ({**model, **{key: each[key] for key in widths if key in each}} for each in (base, other))
        here, small, large = (_shapes(make_model, arguments) for arguments in (model, narrow, {**narrow, **wide}))
        unknown = (override.keys() | set(constant_init)) - here.keys()
        if unknown:
            raise RoleError(f"no weight has the path {', '.join(sorted(unknown))}; there are {', '.join(here)}")
        deep = [_shapes(make_model, {**base, **each}) for each in depth or ()]
        leaves = {}
        for path, (shape, parents) in here.items():
            if path not in small or path not in large or len(small[path][0]) != len(shape):
                raise RoleError(f"{path}: the model at the base width has no such weight")
            grows = tuple(a != b for a, b in zip(small[path][0], large[path][0], strict=True))
            both = [each[path][0] for each in deep if path in each]
            stacked = tuple(a != b for a, b in zip(*both, strict=True)) if len(both) == 2 else (False,) * len(shape)
            leaves[path] = _leaf(path, shape, small[path][0], grows, stacked, parents, layout, override.get(path))
            module, (within, _, name) = parents[-1], path.rpartition(".")
            if name in _BIASES and isinstance(module, _OUT_IN):  # drawn with a std of its layer's fan-in^-1/2
                layer = next((leaves[p] for w in ("weight", "weight_hh") if (p := f"{within}.{w}".lstrip(".")) in leaves), None)
                if layer is not None:  # None: tied to another module's
                    leaves[path] = replace(leaves[path], fan_in=layer.fan_in, initializers="fan_in")
        if not any(any(leaf.grows) for leaf in leaves.values()):
            raise RoleError("no weight grows: base and other must differ in width")
        chosen = {path: replace(leaf, initializers="constant") for path, leaf in leaves.items() if path in constant_init}
        return Roles({**leaves, **chosen}, at)

    return at({})


def infer_over(
    make_model: Callable[..., Any], base: Mapping[str, Any], widths: Iterable[Any], further: Mapping[str, Any]
) -> Roles:
    """The roles of a model that takes a `key`, for a study of some widths, one of which is `other` unless `further` has it.

    The first argument in base is the width; `further` are arguments of infer. Raises RoleError as infer, and if no width differs
    from the base's.
    """
    (name, width), *_ = base.items()
    other = next((each for each in widths if each != width), None)
    if other is None and "other" not in further:
        raise RoleError(f"no width differs from the base's, {name}={width}: give other")
    return infer(partial(make_model, key=jax.random.key(0)), base, **{"other": {name: other}, **further})


def _relative(powers: Powers, ratio: float) -> float:
    return ratio ** (powers.fan_in + powers.width)


def _shapes(make_model: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], list[Any]]]:
    """By path: the shape of a weight, and the modules that it is in, from the outermost."""
    tree = eqx.filter_eval_shape(make_model, **arguments)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            parents = [tree]
            for key in path[:-1]:
                parents.append(_child(parents[-1], key))
            found[path_of(path)] = (tuple(leaf.shape), parents)
    return found


def path_of(path: tuple[Any, ...]) -> str:
    """A path of jax.tree_util with dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _child(parent: Any, key: Any) -> Any:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(parent, key.name, None)
    index = getattr(key, "idx", getattr(key, "key", None))
    try:
        return parent[index]
    except (TypeError, KeyError, IndexError):
        return None


def _leaf(
    path: str,
    shape: tuple[int, ...],
    base: tuple[int, ...],
    grows: tuple[bool, ...],
    stacked: tuple[bool, ...],
    parents: list[Any],
    layout: Layout | None,
    given: LeafRole | None,
) -> Leaf:
    core = [i for i in range(len(shape)) if not stacked[i]]
    growing = [i for i in core if grows[i]]
    ratios = {i: shape[i] / base[i] for i in range(len(shape))}
    module, name = parents[-1], path.rpartition(".")[2]
    outs, ins = _sides(module, name, core, growing, layout)

    def product(dims: list[int]) -> float:
        return math.prod((ratios[i] for i in dims), start=1.0)

    def leaf(role: LeafRole, fan_in: float, fan_out: float, why: str, initializers: Initializers = "fan_in") -> Leaf:
        return Leaf(path, shape, base, grows, stacked, tuple(outs), tuple(ins), role, fan_in, fan_out, initializers, why)

    vector = isinstance(module, _NORMS) or name in (*_BIASES, "scale") or len(core) <= 1
    if given is None and any(isinstance(p, eqx.nn.Shared) for p in parents) and len(growing) == 1 and not vector:
        raise RoleError(f"{path}: is shared, as input and output maybe; say which: override={{{path!r}: ...}}")
    if given is None and outs and not vector and not {*outs, *ins}.issuperset(growing):
        raise RoleError(f"{path} of shape {shape}: a dim that stacks layers or experts grows with width; give an override")
    role, why = given or "fixed", "as told by override"
    if given is None and vector:
        role, why = "vector", "a gain or bias"
    elif given is None and not growing:
        why = "no dim grows with width"
    elif given is None and (isinstance(module, eqx.nn.Embedding) or name == "embedding"):
        role, why = "input", "an embedding: its inputs are one-hot"
    elif given is None and outs:
        both = [any(i in side for i in growing) for side in (ins, outs)]
        role = "hidden" if all(both) else "input" if both[1] else "output"
        why = {"hidden": "inputs and outputs grow", "input": "only its outputs grow", "output": "only its inputs grow"}[role]
    elif given is None and len(growing) == 2:
        role, why = "hidden", "two dims grow"
    elif given is None:
        what = "one of its dims grows" if len(growing) == 1 else f"{len(growing)} of its dims grow"
        raise RoleError(f"{path} of shape {shape}: {what}: input or output? Give a layout, or override={{{path!r}: ...}}")

    if role == "fixed":
        return leaf(role, 1.0, 1.0, why, "constant")
    if role == "vector":
        return leaf(role, 1.0, product(growing), why, "constant")
    if role == "input":
        return leaf(role, 1.0, product(growing), why)
    inner = [i for i in growing if i in ins] if outs else growing[:1]
    outer = [i for i in growing if i not in inner]
    if role == "output":
        return leaf(role, product(inner if outs else growing), 1.0, why)
    if not outs and outer and not math.isclose(product(inner), product(outer)):
        raise RoleError(f"{path} of shape {shape}: its two dims grow by different factors; give a layout")
    return leaf(role, product(inner), product(outer), why)


def _sides(module: Any, name: str, core: list[int], growing: list[int], layout: Layout | None) -> tuple[list[int], list[int]]:
    """The dims of outputs and of inputs; both empty if that is not known."""
    if len(core) < 2:
        return [], []
    if name == "kernel":  # as Flax names and lays them out
        return core[-1:], core[:-1]
    if isinstance(module, _OUT_IN):
        own = core[-2 - getattr(module, "num_spatial_dims", 0) :]  # dims before them stack what eqx.filter_vmap made
        return own[:1], own[1:]
    pair = core if len(core) == 2 else growing  # of three dims one may be a stack of layers or experts
    if layout is None or len(pair) != 2:
        return [], []
    return (pair[:1], pair[1:]) if layout == "out_in" else (pair[1:], pair[:1])
