"""The number of rounds of a while loop, which XLA:TPU does not write down, by evaluating the loop's scalar integers."""

import operator
from collections.abc import Sequence
from typing import Any

from mutransformer.planning.compiled.hlo import Module, Op

_SAME_VALUE = {"copy", "bitcast", "convert", "reshape", "broadcast", "copy-done", "copy-start", "reduce-precision"}
_BINARY = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_COMPARE = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne}
_MAX_ROUNDS = 1_000_000

Value = int | tuple[Any, ...] | None  # a scalar integer, a tuple of values, or anything else: unknown


def trip_count(module: Module, loop: Op) -> int | None:
    """How often a loop's body runs; None if that does not follow from constants in the program."""
    if known := loop.find(r"known_trip_count\D*(\d+)"):
        return int(known)
    condition, body = (module.root(loop.attr(key)) for key in ("condition", "body"))
    state = _evaluate(module, module.ops.get(loop.operands[0]), ())
    for rounds in range(_MAX_ROUNDS):
        goes_on = _evaluate(module, condition, (state,))
        if goes_on is None:
            return None
        if not goes_on:
            return rounds
        state = _evaluate(module, body, (state,))
    return None


def _evaluate(module: Module, op: Op | None, parameters: Sequence[Value]) -> Value:
    """The value of an operation, given the parameters of the computation that it stands in."""
    if op is None:
        return None
    if op.opcode == "parameter":
        index = int(op.args)
        return parameters[index] if index < len(parameters) else None
    operands = [module.ops.get(name) for name in op.operands]
    if op.opcode == "tuple":
        return tuple(_evaluate(module, each, parameters) for each in operands)
    if op.opcode == "get-tuple-element":
        whole = _evaluate(module, operands[0], parameters) if operands[0] and operands[0].opcode == "parameter" else None
        return whole[int(op.attr("index"))] if isinstance(whole, tuple) else None
    if any(a.shape not in ((), (1,)) for a in op.arrays):
        return None
    if op.opcode == "constant":
        return int(op.args) if op.args.removeprefix("-").isdecimal() else None
    values = [_evaluate(module, each, parameters) for each in operands]
    if op.opcode == "fusion":
        return _evaluate(module, module.root(op.attr("calls")), values)
    if op.opcode in _SAME_VALUE:
        return values[0]
    combine = _COMPARE.get(op.attr("direction")) if op.opcode == "compare" else _BINARY.get(op.opcode)
    if combine is None or not all(isinstance(value, int) for value in values):
        return None
    return int(combine(*values))
