"""Parser for XLA's text of a compiled program. With is_scheduled=true the order of operations is the order of execution.

Knows nothing of time or chips. The grammar is not published: this reads what the compiler was seen to write. It does not write
the number of rounds of a while loop: that follows from evaluating the loop's scalar integers.
"""

import itertools
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = ")
_NESTED = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"  # text with balanced brackets, at most two deep
_OP = re.compile(rf"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(({_NESTED})\)(.*)")


class Array(NamedTuple):
    """An array in a type. in_hbm: in main memory; in a layout, S(1) is VMEM and higher numbers hold flags and scalars."""

    shape: tuple[int, ...]
    bytes: float
    in_hbm: bool


def ints(text: str) -> tuple[int, ...]:
    """The numbers of a comma-separated list."""
    return tuple(int(n) for n in text.split(",") if n)


@dataclass(frozen=True)
class Op:
    """A line: `name = type opcode(args), attrs`."""

    name: str
    type: str
    opcode: str
    args: str
    attrs: str
    is_root: bool

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operations that it reads."""
        return re.findall(r"%([\w.\-]+)", self.args)

    @cached_property
    def arrays(self) -> list[Array]:
        """Every array in its result, in order."""
        out = []
        for dtype, dims, layout in _ARRAY.findall(self.type):
            bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
            out.append(Array(ints(dims), math.prod(ints(dims)) * bits / 8, "S(" not in layout))
        return out

    def find(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; empty if it does not occur."""
        found = re.search(pattern, self.attrs)
        return found[1] if found else ""

    def attr(self, key: str) -> str:
        """The name or number behind `key=`; empty if absent."""
        return self.find(rf"(?<![\w-]){key}=%?([\w.\-]+)")

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None if absent."""
        text = self.find(r'"estimated_cycles":"(\d+)"')
        return int(text) if text else None

    @property
    def source(self) -> str:
        """op_name: where in the program it comes from; empty if absent."""
        return self.find(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Module:
    """A program: operations by computation, the name of the entry computation, the number of devices."""

    computations: dict[str, list[Op]]
    entry: str
    n_devices: int

    @cached_property
    def ops(self) -> dict[str, Op]:
        """Every operation by name; names are unique in a module."""
        return {op.name: op for ops in self.computations.values() for op in ops}

    def root(self, computation: str) -> Op | None:
        """The operation whose result is the computation's."""
        return next((op for op in self.computations.get(computation, ()) if op.is_root), None)

    def inputs(self, op: Op) -> list[Array]:
        """The arrays that an operation reads."""
        return [a for name in op.operands if name in self.ops for a in self.ops[name].arrays]

    def called(self, op: Op) -> list[Op]:
        """The operations inside a fusion, call or asynchronous wrapper."""
        return self.computations.get(op.attr("calls") or op.attr("to_apply"), [])

    def nested(self, op: Op) -> Iterator[Op]:
        """The operations inside, also those of fusions and calls among them."""
        for inner in self.called(op):
            yield inner
            if inner.opcode in ("fusion", "call"):
                yield from self.nested(inner)


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`. Raises ValueError if it is not the text of a scheduled module."""
    if "is_scheduled=true" not in text[:200_000]:
        raise ValueError("not the text of a scheduled HLO module")
    computations: dict[str, list[Op]] = {}
    entry, body = "", None
    held = ""  # the lines of an operation so far: metadata of Pallas kernels spans several
    for line, after in itertools.pairwise([*text.splitlines(), ""]):
        ends = line.rstrip() == "}" and not after.strip()  # a computation; in metadata no empty line follows
        if body is None:
            if header := _HEADER.match(line):
                body = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif ends or _START.match(line):
            if held:
                found = _OP.match(held)
                if not found:
                    raise ValueError(f"not an HLO operation: {held[:80]}")
                is_root, *parts = found.groups()
                body.append(Op(*parts, is_root=is_root is not None))
            body, held = (None, "") if ends else (body, line)
        else:
            held += " " + line.strip()
    devices = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(devices[1]) if devices else 1)


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
