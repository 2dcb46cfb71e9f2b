"""What a profiler's trace says of the devices: when which operation ran, in which category, and where nothing did. Pure.

Times are in seconds from the begin of the first operation.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from mutransformer.planning.compiled.cost_model import COLLECTIVES
from mutransformer.planning.compiled.hlo import Module, Op

Category = str  # of CATEGORIES
# At an instant at which several operations run, the first of these that is among them counts: the collectives' share is what is
# not hidden behind computation.
CATEGORIES: tuple[Category, ...] = ("matrix products", "attention", "other", "copies", "collectives")
LONG = 1e-4  # seconds: a gap that is not just the time between two kernels
RESOLUTION = 1e-9  # seconds: a shorter gap is rounding
CONTAINERS = {"while", "call", "conditional"}  # what runs inside them is in the trace too

_PRODUCTS = {"dot", "convolution"}
_COPIES = {"copy", "copy-start", "copy-done", "transpose", "slice-start", "slice-done"}
_KERNELS: dict[Category, re.Pattern[str]] = {  # of GPUs, by the names that CUDA's libraries and XLA give them
    "collectives": re.compile(
        r"nccl|all[-_]?(gather|reduce|to[-_]?all)|reduce[-_]?scatter|collective[-_]?permute", re.IGNORECASE
    ),
    "attention": re.compile(r"fmha|flash|sdpa|attention|splash", re.IGNORECASE),
    "matrix products": re.compile(r"gemm|cutlass|cublas|nvjet|xmma|wgmma|\bdot\b|_dot|convolution", re.IGNORECASE),
    "copies": re.compile(r"memcpy|memset|^copy|_copy|transpose", re.IGNORECASE),
}
_OF_ATTENTION = re.compile(
    r"(?<![\w])(transpose\(|jvp\(|checkpoint\(|rematted_computation\()*(splash_)?attention\b|fmha|dot_product_attention"
)


class Event(NamedTuple):
    """Something that ran from start to end: of a device an operation, by its name in the program; of the host whatever it did."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Gap(NamedTuple):
    """An interval in which no operation ran."""

    start: float
    end: float
    before: str  # the operation that ended last; `after`: the one that came next
    after: str
    between_steps: bool | None  # whether one step had ended and the next had not begun; None: the trace does not tell steps apart

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The operations of one device over some complete steps, without loops and calls, by start."""

    operations: Sequence[Event]
    n_steps: int

    @property
    def seconds(self) -> float:
        """From the begin of the first operation to the end of the last."""
        return max(each.end for each in self.operations) - min(each.start for each in self.operations)

    def shares(self, category: Callable[[str], Category]) -> dict[str, float]:
        """The fraction of the time that each category takes, and "idle"; together 1."""
        edges: list[tuple[float, int, Category]] = []
        for each in self.operations:
            kind = category(each.name)
            edges += [(each.start, 1, kind), (each.end, -1, kind)]
        edges.sort(key=lambda edge: edge[0])
        running: Counter[Category] = Counter()
        total: dict[str, float] = dict.fromkeys((*CATEGORIES, "idle"), 0.0)
        for (at, change, kind), (then, *_) in zip(edges, edges[1:], strict=False):
            running[kind] += change
            total[next((each for each in CATEGORIES if running[each]), "idle")] += then - at
        return {kind: spent / self.seconds for kind, spent in total.items()}

    def gaps(self) -> list[Gap]:
        """Where nothing ran, the longest first."""
        steps, found = self.steps(), list[Gap]()
        latest = self.operations[0]
        for each in self.operations[1:]:
            if each.start - latest.end >= RESOLUTION:
                between = None
                if steps is not None:
                    ended = sum(end <= latest.end for _, end in steps)
                    between = ended > 0 and sum(begin < each.start for begin, _ in steps) == ended
                found.append(Gap(latest.end, each.start, latest.name, each.name, between))
            latest = max(latest, each, key=lambda event: event.end)
        return sorted(found, key=lambda gap: -gap.seconds)

    def steps(self) -> list[tuple[float, float]] | None:
        """Begin and end of each step, by the operations that run once per step; None if there are none."""
        times: defaultdict[str, list[Event]] = defaultdict(list)
        for each in self.operations:
            times[each.name].append(each)
        once = [events for events in times.values() if len(events) == self.n_steps]
        if not once:
            return None
        return [(min(e[i].start for e in once), max(e[i].end for e in once)) for i in range(self.n_steps)]

    def longest(self, n: int) -> list[tuple[str, float, float]]:
        """(name, seconds, runs) per step of the n operations that take most of the time, by name."""
        seconds: defaultdict[str, float] = defaultdict(float)
        runs: Counter[str] = Counter()
        for each in self.operations:
            seconds[each.name] += each.seconds
            runs[each.name] += 1
        top = sorted(seconds, key=lambda name: -seconds[name])[:n]
        return [(name, seconds[name] / self.n_steps, runs[name] / self.n_steps) for name in top]


def timeline(events: Iterable[Event], n_steps: int, module: Module | None = None) -> Timeline:
    """The timeline of the events of a device. Raises ValueError if there are none."""
    found = sorted((each for each in events if not _is_container(each.name, module)), key=lambda event: event.start)
    if not found:
        raise ValueError("the trace has no operation of a device")
    begin = found[0].start
    return Timeline([each._replace(start=each.start - begin, end=each.end - begin) for each in found], n_steps)


def categories(module: Module | None) -> Callable[[str], Category]:
    """The category of an operation by its name, read in the compiled program, or of a kernel that is not in it, by its name."""

    known: dict[str, Category] = {}

    def category(name: str) -> Category:
        if name not in known:
            op = module.ops.get(name) if module else None
            known[name] = _of_name(name) if op is None or module is None else _of_operation(op, module)
        return known[name]

    return category


def _is_container(name: str, module: Module | None) -> bool:
    op = module.ops.get(name) if module else None
    return (re.sub(r"[.\d]+$", "", name) if op is None else op.opcode) in CONTAINERS


def _of_operation(op: Op, module: Module) -> Category:
    inside = [op, *module.nested(op)]
    opcodes = {each.opcode for each in inside}
    if any(each.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES for each in inside):
        return "collectives"
    if _OF_ATTENTION.search(op.source) or (op.opcode == "custom-call" and "fmha" in op.attrs):
        return "attention"
    if opcodes & _PRODUCTS or any(each.opcode == "custom-call" and re.search("gemm|matmul", each.attrs) for each in inside):
        return "matrix products"
    moves = opcodes - {"fusion", "parameter", "bitcast", "tuple", "get-tuple-element", "reshape"}
    return "copies" if moves and moves <= _COPIES else "other"


def _of_name(name: str) -> Category:
    return next((kind for kind, pattern in _KERNELS.items() if pattern.search(name)), "other")


def meanwhile(gap: Gap, host: Sequence[Event], n: int = 2) -> list[tuple[str, float]]:
    """The host's events that overlap a gap longest, by name, and for how long each does: at most n, none below a tenth of it."""
    overlap: defaultdict[str, float] = defaultdict(float)
    for name, events in groupby(sorted(host, key=lambda event: event.name), key=lambda event: event.name):
        parts = sorted((max(e.start, gap.start), min(e.end, gap.end)) for e in events)
        reached = gap.start
        for begin, end in parts:  # of events that overlap each other, a moment counts once
            overlap[name] += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
    found = sorted(((name, spent) for name, spent in overlap.items() if spent >= 0.1 * gap.seconds), key=lambda item: -item[1])
    return found[:n]


def gaps_in_words(line: Timeline, gaps: Sequence[Gap]) -> str:
    """How much of the time no operation ran, how often, and how much of that lies between steps."""
    idle = sum(gap.seconds for gap in gaps)
    if not gaps:
        return f"No gaps: in {line.n_steps} steps some operation ran at every moment."
    per_step = f"{1e3 * idle / line.n_steps:.3g} ms a step"
    text = f"No operation ran for {idle / line.seconds:.1%} of the time ({per_step}), in {len(gaps)} gaps."
    if any(gap.between_steps is None for gap in gaps):
        text += " The trace does not tell steps apart."
    else:
        between = sum(gap.seconds for gap in gaps if gap.between_steps)
        text += f" Of that, {between / idle:.0%} lies between steps, {1 - between / idle:.0%} within them."
    long, longest = [gap.seconds for gap in gaps if gap.seconds >= LONG], gaps[0].seconds
    text += f" {len(long)} of them last at least {1e3 * LONG:g} ms, together {sum(long) / idle:.0%} of the idle time"
    return f"{text}; the longest takes {1e3 * longest:.3g} ms."


def in_words(gap: Gap, host: Sequence[Event], origin: Mapping[str, str]) -> str:
    """One gap: how long, where, between which operations, and what the host did meanwhile. `origin`: where a name comes from."""
    where = {True: "between two steps, ", False: "within a step, ", None: ""}[gap.between_steps]
    text = (
        f"{1e3 * gap.seconds:.3g} ms {where}after {origin.get(gap.before, gap.before)}, before {origin.get(gap.after, gap.after)}"
    )
    busy = [f"{name} ({spent / gap.seconds:.0%} of it)" for name, spent in meanwhile(gap, host)]
    return f"{text}; the host was in {' and '.join(busy)}" if busy else f"{text}; the trace has nothing of the host in it"
