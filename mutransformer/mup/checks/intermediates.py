"""The products inside any loss, found by interpreting its jaxpr: what a coordinate check of a model that is not ours measures.

An activation is what depends on the batch. Recorded is every matrix product, convolution and embedding lookup whose result is an
activation, under the path of the weight that it multiplies or looks up. A weight is followed through all that is done to it
alone: transposition, casts, slices of a stack, normalization. Products of two activations, as in attention, are numbered.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from mutransformer.mup.roles import path_of

# The paths of the weights that a value is made of; empty: a constant; None: it depends on the batch.
Source = frozenset[str] | None
_CONSTANT: Source = frozenset()

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_LOOKUPS = ("gather", "dynamic_slice")  # the second of one row
# Equations that call a function once with their own operands, and the parameter that holds it.
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat2", "checkpoint"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}
_RESHAPES = ("transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy", "sharding_constraint")


class _Value(eqx.Module):
    """A value of the program; `product` is the index of the recorded product that it is, up to shape and an added bias."""

    array: Any
    source: Source = eqx.field(static=True)
    product: int | None = eqx.field(static=True, default=None)


class Product(eqx.Module):
    """A product, and the paths of the weights in it: mostly one; none if both factors are activations."""

    name: str = eqx.field(static=True)
    weights: tuple[str, ...] = eqx.field(static=True)
    array: Any


def products(loss: Callable[[Any, Any], Any], model: Any, batch: Any) -> tuple[Array, list[Product]]:
    """What loss(model, batch) returns, and the products that it computes on the way, in program order.

    A product is recorded with the scalars that it alone is multiplied by afterwards, as attention's logits may be, and before a
    bias is added. In a scan it is stacked over iterations, [iterations, ...]. In a cond it is recorded if all branches compute
    the same products, in a while loop never. It is called by the path of its weight, a second one "path (2)"; with several
    weights "path & path"; with none "product 1".

    Args:
        loss: any function of JAX; it may use jit, vmap, checkpoint, custom derivatives.
        model: any pytree. Its inexact arrays are the weights.
        batch: any pytree of arrays and static values.
    """
    weights, rest = eqx.partition(model, eqx.is_inexact_array)
    data, fixed = eqx.partition(batch, is_data)
    closed = jax.make_jaxpr(lambda w, d: loss(eqx.combine(w, rest), eqx.combine(d, fixed)))(weights, data)
    values = [_Value(w, frozenset({path_of(path)})) for path, w in jax.tree_util.tree_leaves_with_path(weights)]
    found: list[Product] = []
    outs = _evaluate(closed, [*values, *(_Value(x, None) for x in jax.tree.leaves(data))], found)
    return outs[0].array, _named(found)


def is_data(leaf: Any) -> bool:
    """Whether a leaf of a batch is an array. Other leaves are static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _named(found: Sequence[Product]) -> list[Product]:
    seen: Counter[str] = Counter()
    named = []
    for each in found:
        seen[each.name] += 1
        n = seen[each.name]
        name = f"{each.name} {n}" if not each.weights else each.name if n == 1 else f"{each.name} ({n})"
        named.append(Product(name, each.weights, each.array))
    return named


def _evaluate(closed: ClosedJaxpr | Jaxpr, args: Sequence[_Value], found: list[Product]) -> list[_Value]:
    """The results of a jaxpr. Appends to `found`, to which the values' indices refer."""
    jaxpr, consts = (closed.jaxpr, closed.consts) if isinstance(closed, ClosedJaxpr) else (closed, [])
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*(_Value(c, _CONSTANT) for c in consts), *args], strict=True))
    uses = Counter(
        a for atoms in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars) for a in atoms if not isinstance(a, Literal)
    )

    def read(atom: Any) -> _Value:
        if isinstance(atom, Literal):
            return _Value(atom.val, _CONSTANT)
        value = env[atom]
        return value if uses[atom] == 1 else _Value(value.array, value.source)

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _apply(eqn, jaxpr, [read(atom) for atom in eqn.invars], found), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: JaxprEqn, jaxpr: Jaxpr, args: list[_Value], found: list[Product]) -> list[_Value]:
    name = eqn.primitive.name
    if name in _CALLS:
        return _evaluate(eqn.params[_CALLS[name]], args, found)
    if name == "scan":
        return _scan(eqn, args, found)
    source = _join(args)
    if name == "cond":
        results = _cond(eqn, jaxpr, args, found)
    else:
        results = _one(eqn, jaxpr, args)
    if source is None and (name in _PRODUCTS or (name in _LOOKUPS and args[0].source)):
        if jnp.issubdtype(results[0].dtype, jnp.inexact):
            weights = sorted(frozenset[str]().union(*(v.source for v in args[:2] if v.source)))
            found.append(Product(" & ".join(weights) or "product", tuple(weights), results[0]))
            return [_Value(results[0], source, len(found) - 1)]
    return [_Value(result, source, _same_product(name, args, found)) for result in results]


def _one(eqn: JaxprEqn, jaxpr: Jaxpr, args: Sequence[_Value]) -> list[Any]:
    """The results of one equation of a jaxpr, as JAX evaluates it."""
    given = {atom: v.array for atom, v in zip(eqn.invars, args, strict=True) if not isinstance(atom, Literal)}
    alone = jaxpr.replace(constvars=[], invars=[*given], outvars=eqn.outvars, eqns=[eqn])
    return jaxpr_as_fun(ClosedJaxpr(alone, []))(*given.values())


def _same_product(name: str, args: list[_Value], found: list[Product]) -> int | None:
    """The product that the result of an equation still is; applies to the recorded one what scales it."""
    at = next((i for i, v in enumerate(args) if v.product is not None), None)
    if at is None:
        return None
    product, others = args[at].product, [v for i, v in enumerate(args) if i != at]
    assert product is not None
    if name in _RESHAPES:
        return product
    if len(others) != 1 or others[0].source is None:
        return None
    if name in ("add", "sub"):
        return product
    if (name == "mul" or (name == "div" and at == 0)) and math.prod(jnp.shape(others[0].array)) == 1:
        scale = jnp.reshape(others[0].array, ())
        raw = found[product]
        found[product] = Product(raw.name, raw.weights, raw.array * scale if name == "mul" else raw.array / scale)
        return product
    return None


def _join(values: Sequence[_Value]) -> Source:
    sources = [v.source for v in values]
    return None if None in sources else frozenset().union(*(s for s in sources if s is not None))


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _scan(eqn: JaxprEqn, args: list[_Value], found: list[Product]) -> list[_Value]:
    closed: ClosedJaxpr | Jaxpr = eqn.params["jaxpr"]
    body = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
    # What is sliced or stacked has one dim less inside. JAX 0.12 no longer states how many constants and carries there are.
    n_stacked = sum(_shape(out) != _shape(inside) for out, inside in zip(eqn.invars, body.invars, strict=True))
    n_carry = sum(_shape(out) == _shape(inside) for out, inside in zip(eqn.outvars, body.outvars, strict=True))
    n_consts = len(args) - n_carry - n_stacked
    consts = [_Value(v.array, v.source) for v in args[:n_consts]]
    carry, stacked = args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]

    def iteration(sources: list[Source], arrays: list[Any], slices: list[Any]) -> tuple[list[_Value], list[Product]]:
        inner: list[Product] = []
        carried = [_Value(array, source) for array, source in zip(arrays, sources, strict=True)]
        sliced = [_Value(array, v.source) for array, v in zip(slices, stacked, strict=True)]
        outs = _evaluate(closed, [*consts, *carried, *sliced], inner)
        return [_Value(v.array, v.source) for v in outs], inner

    # What an iteration puts into the carry depends on what it finds there: repeated until nothing is added.
    avals: list[Any] = [v.aval for v in body.invars[n_consts:]]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    sources = [v.source for v in carry]
    while True:
        outs, _ = jax.eval_shape(lambda *a, s=sources: iteration(s, *a), shapes[:n_carry], shapes[n_carry:])
        wider = [_join([_Value(None, a), b]) for a, b in zip(sources, outs[:n_carry], strict=True)]
        if wider == sources:
            break
        sources = wider

    def step(arrays: list[Any], slices: list[Any]) -> tuple[list[Any], tuple[list[_Value], list[Product]]]:
        outs, inner = iteration(sources, arrays, slices)
        return [v.array for v in outs[:n_carry]], (outs[n_carry:], inner)

    how = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    last, (results, inner) = jax.lax.scan(step, [v.array for v in carry], [v.array for v in stacked], **how)
    found += inner
    return [*(_Value(array, source) for array, source in zip(last, sources, strict=True)), *results]


def _cond(eqn: JaxprEqn, jaxpr: Jaxpr, args: list[_Value], found: list[Product]) -> list[Any]:
    index, *operands = args

    def branch(of: ClosedJaxpr) -> Callable[..., tuple[list[Any], list[Product]]]:
        def run(*arrays: Any) -> tuple[list[Any], list[Product]]:
            inner: list[Product] = []
            outs = _evaluate(of, [_Value(array, v.source) for array, v in zip(arrays, operands, strict=True)], inner)
            return [v.array for v in outs], inner

        return run

    branches, arrays = [branch(each) for each in eqn.params["branches"]], [v.array for v in operands]
    inside = [jax.eval_shape(run, *arrays)[1] for run in branches]
    if any(not eqx.tree_equal(inside[0], other) for other in inside[1:]):
        return _one(eqn, jaxpr, args)
    outs, inner = jax.lax.switch(index.array, branches, *arrays)
    found += inner
    return outs
