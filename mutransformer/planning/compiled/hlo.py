"""Parser for XLA's text of a compiled program. With is_scheduled=true the order of operations is the order of execution.

Knows nothing of time or chips. The grammar is not published: this reads what the compiler was seen to write.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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

    @property
    def bytes(self) -> float:
        return sum(a.bytes for a in self.arrays)

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
    """Parses `compiled.as_text()`.

    Raises:
        ValueError: the text is not a scheduled module.
    """
    if "is_scheduled=true" not in text[:200_000]:
        raise ValueError("not the text of a scheduled HLO module")
    computations: dict[str, list[Op]] = {}
    entry, body = "", None
    for line in _logical_lines(text):
        if body is None:
            if header := _HEADER.match(line):
                body = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line == "}":
            body = None
        elif op := _OP.match(line):
            root, name, type_, opcode, args, attrs = op.groups()
            body.append(Op(name, type_, opcode, args, attrs, root is not None))
        elif line:
            raise ValueError(f"not an HLO operation: {line[:80]}")
    devices = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(devices[1]) if devices else 1)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, with an operation's continuation lines (metadata of Pallas kernels) joined to it."""
    held, inside = "", False
    lines = text.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if not inside:
            inside = bool(_HEADER.match(line))
            yield line
        elif line.rstrip() == "}" and not after.strip():  # the end of a computation; in metadata no empty line follows
            yield held
            yield "}"
            held, inside = "", False
        elif _START.match(line):
            yield held
            held = line
        else:
            held += " " + line.strip()
