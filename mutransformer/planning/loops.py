"""How often a while loop runs. XLA:TPU does not say: it follows from the condition, the start and the increment."""

import math
import re

from mutransformer.planning.hlo import Module, Op

_THROUGH = {"copy", "bitcast", "convert", "reshape", "broadcast", "copy-done", "copy-start", "reduce-precision"}
State = tuple[str, int]  # ("element", i): of the loop's state
Value = int | State | None


def trip_count(module: Module, computation: str, loop: Op) -> int | None:
    """Rounds of a loop over a counter that is compared with a constant; None if it is no such loop.

    Args:
        module: that holds it.
        computation: in which the loop stands.
        loop: the while operation.
    """
    if found := re.search(r"known_trip_count\D*(\d+)", loop.attrs):
        return int(found[1])
    condition, body = loop.attr("condition"), loop.attr("body")
    compare = _through_fusion(module, condition, _root(module, condition))
    if compare is None or compare[1].opcode != "compare":
        return None
    where, op = compare
    sides = [_start(module, computation, loop, body, _value(module, where, name, condition)) for name in op.operands]
    counter = next((side for side in sides if not isinstance(side, int)), None)
    limit = next((side for side in sides if isinstance(side, int)), None)
    if counter is None or limit is None:
        return None
    first, step = _initial(module, computation, loop, counter), _increment(module, body, counter)
    if first is None or not step:
        return None
    return max(0, math.ceil(abs(limit - first) / abs(step)) + (op.attr("direction") in ("LE", "GE")))


def _root(module: Module, computation: str) -> Op | None:
    return next((op for op in module.computations.get(computation, ()) if op.is_root), None)


def _through_fusion(module: Module, computation: str, op: Op | None) -> tuple[str, Op] | None:
    """Where an operation's result is computed, and by which operation: a fusion's root, copies left out."""
    while op is not None:
        if op.opcode == "fusion":
            computation = op.attr("calls")
            op = _root(module, computation)
        elif op.opcode in _THROUGH:
            op = module.by_name[computation].get(op.operands[0])
        else:
            return computation, op
    return None


def _value(module: Module, where: str, name: str, outer: str) -> Value:
    """A constant, or an element of the state that `outer`, a loop's condition or body, gets; `where`: that or a fusion in it."""
    found = _through_fusion(module, where, module.by_name[where].get(name))
    if found is None:
        return None
    where, op = found
    if op.opcode == "constant":
        return int(op.args) if re.fullmatch(r"-?\d+", op.args) else None
    if op.opcode == "get-tuple-element":
        source = module.by_name[where].get(op.operands[0])
        return ("element", int(op.attr("index"))) if source is not None and source.opcode == "parameter" else None
    if op.opcode == "parameter" and where != outer:
        caller = next((each for each in module.computations[outer] if each.attr("calls") == where), None)
        return None if caller is None else _value(module, outer, caller.operands[int(op.args)], outer)
    return None


def _start(module: Module, computation: str, loop: Op, body: str, value: Value) -> Value:
    """An element that the body hands on as it is, as the constant it is at the start."""
    root = _root(module, body)
    if isinstance(value, tuple) and root is not None and _value(module, body, root.operands[value[1]], body) == value:
        return _initial(module, computation, loop, value)
    return value


def _initial(module: Module, computation: str, loop: Op, element: State) -> int | None:
    state = module.by_name[computation].get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    value = _value(module, computation, state.operands[element[1]], computation)
    return value if isinstance(value, int) else None


def _increment(module: Module, body: str, counter: State) -> int | None:
    root = _root(module, body)
    if root is None or root.opcode != "tuple":
        return None
    found = _through_fusion(module, body, module.by_name[body].get(root.operands[counter[1]]))
    if found is None or found[1].opcode not in ("add", "subtract"):
        return None
    where, op = found
    sides = [_value(module, where, name, body) for name in op.operands]
    if counter not in sides:
        return None
    step = next((side for side in sides if isinstance(side, int)), None)
    return -step if step is not None and op.opcode == "subtract" else step
