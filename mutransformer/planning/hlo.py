"""XLA's text of a compiled program, read into operations. With is_scheduled=true their order is the order of execution.

Nothing of time or of chips. The text's grammar is not published: what is read here is what the compiler was seen to write.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

_BITS = {
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 8),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


class Array(NamedTuple):
    """in_hbm: in main memory. Layouts name others: S(1) is VMEM, above it are flags and scalars."""

    shape: tuple[int, ...]
    bytes: float
    in_hbm: bool


def arrays(type_: str) -> list[Array]:
    """Every array in a type, in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(type_):
        if dtype in _BITS:
            shape = tuple(int(n) for n in dims.split(",") if n)
            found.append(Array(shape, math.prod(shape) * _BITS[dtype] / 8, "S(" not in layout))
    return found


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
        return re.findall(r"%([\w.\-]+)", self.args)

    @cached_property
    def arrays(self) -> list[Array]:
        return arrays(self.type)

    @property
    def bytes(self) -> float:
        return sum(a.bytes for a in self.arrays)

    def attr(self, key: str) -> str:
        """The name or number behind `key=`; empty if it has none."""
        found = re.search(rf"(?<![\w-]){key}=%?([\w.\-]+)", self.attrs)
        return found[1] if found else ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the backend has noted."""
        _, found, text = self.attrs.partition("backend_config=")
        if not text.startswith("{"):
            return {}
        return json.JSONDecoder().raw_decode(text)[0]

    @property
    def cycles(self) -> int | None:
        """As the compiler estimates them."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attrs)
        return int(found[1]) if found else None

    @property
    def source(self) -> str:
        """Where in the program it comes from: op_name."""
        found = re.search(r'op_name="([^"]*)"', self.attrs)
        return found[1] if found else ""


@dataclass(frozen=True)
class Module:
    """Computations by name; the entry's name; the number of devices."""

    computations: dict[str, list[Op]]
    entry: str
    n_devices: int

    @cached_property
    def by_name(self) -> dict[str, dict[str, Op]]:
        """Of each computation."""
        return {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    @cached_property
    def types(self) -> dict[str, Op]:
        """Every operation: names are unique in a module."""
        return {op.name: op for ops in self.computations.values() for op in ops}

    def inputs(self, op: Op) -> list[Array]:
        """The arrays that an operation reads."""
        return [a for name in op.operands if name in self.types for a in self.types[name].arrays]

    def called(self, op: Op) -> list[Op]:
        """What a fusion, a call or an asynchronous wrapper stands for."""
        return self.computations.get(op.attr("calls") or op.attr("to_apply"), [])

    def within(self, op: Op, depth: int = 5) -> Iterator[Op]:
        """The operations that it stands for, those of fusions and calls among them too."""
        for inner in self.called(op):
            yield inner
            if depth and inner.opcode in ("fusion", "call"):
                yield from self.within(inner, depth - 1)


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: it is no scheduled module.
    """
    if "is_scheduled=true" not in text[:200_000]:
        raise ValueError("not the text of a scheduled HLO module")
    computations: dict[str, list[Op]] = {}
    entry, body = "", None
    for line in _logical_lines(text):
        if body is None:
            if found := _HEADER.match(line):
                body = computations.setdefault(found[2], [])
                entry = found[2] if found[1] else entry
        elif line == "}":
            body = None
        elif found := _OP.match(line):
            body.append(_op(line, found))
    devices = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(devices[1]) if devices else 1)


def _op(line: str, found: re.Match[str]) -> Op:
    start = found.end()
    stop = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", stop)
    closing = _closing(line, opening)
    opcode, args = line[stop:opening].strip(), line[opening + 1 : closing - 1]
    return Op(found[2], line[start:stop], opcode, args, line[closing:], bool(found[1]))


def _closing(line: str, start: int) -> int:
    """The index behind the bracket that closes the one at start."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"unbalanced brackets in HLO: {line[start : start + 80]}")


def _logical_lines(text: str) -> Iterator[str]:
    """Lines; the attributes of an operation that run over several (metadata of Pallas kernels) joined to it."""
    held, inside = "", False
    lines = text.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if not inside:
            inside = bool(_HEADER.match(line))
            yield line
        elif line.rstrip() == "}" and not after.strip():  # a computation's end; metadata may hold such a line too
            yield held
            yield "}"
            held, inside = "", False
        elif _OP.match(line):
            yield held
            held = line
        else:
            held += " " + line.strip()
