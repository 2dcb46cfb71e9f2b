"""A schedule walked through in time: one core that takes operations in order, links and memory transfers that run beside it.

An asynchronous collective keeps its links busy from its start, and the core waits for it only where its result is taken; a
synchronous one blocks the core. Two on the same link queue; permutes in opposite directions do not meet. Transfers between HBM
and VMEM queue on the HBM. Loops are their body times their rounds. What waits is exposed.

Not modelled: HBM shared by core, links and transfers; two axes of the mesh on one link; missing wraparound; stragglers; the host.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mutransformer.planning import comm
from mutransformer.planning.comm import Collective
from mutransformer.planning.hlo import Module, Op
from mutransformer.planning.loops import trip_count
from mutransformer.planning.timing import Timer

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("add-dependency", "opt-barrier", "domain"),
}
_LEAST_COPY = 64  # bytes: the results of a slice-start hold flags besides the slice


class Span(NamedTuple):
    """lane: core or hbm. kind: of a Cost; wait: the core for a memory transfer; transfer: one. label: of what."""

    lane: str
    kind: str
    start: float
    seconds: float
    label: str


class Transfer(NamedTuple):
    """exposed: seconds for which the core waits for it."""

    collective: Collective
    start: float
    is_async: bool
    exposed: float
    waits_at: float


class Rounds(NamedTuple):
    """A loop; or something called, once."""

    start: float
    n: int
    each: "Schedule"
    label: str


@dataclass
class Schedule:
    """What a computation does, in seconds from its start."""

    seconds: float = 0.0
    spans: list[Span] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    inner: list[Rounds] = field(default_factory=list)
    warnings: set[str] = field(default_factory=set)

    def flat(self, times: int = 1) -> Iterator[tuple["Schedule", int]]:
        """This and those within, each with how often it runs."""
        yield self, times
        for rounds in self.inner:
            yield from rounds.each.flat(times * rounds.n)


class Key(NamedTuple):
    """A kind of collective, as reported."""

    kind: str
    axes: tuple[str, ...]
    n: int
    is_async: bool


@dataclass
class Totals:
    """Sums over a step, of one device. by_kind: seconds of spans. collectives: count, bytes, wire, seconds, exposed seconds."""

    seconds: float
    by_kind: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    collectives: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 5))
    by_source: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    warnings: list[str] = field(default_factory=list)

    def costly(self, n: int) -> list[tuple[str, str, float]]:
        """What takes the most seconds: kind, source, seconds."""
        return [(*key, seconds) for key, seconds in sorted(self.by_source.items(), key=lambda item: -item[1])[:n] if seconds]

    @property
    def compute(self) -> float:
        return sum(self.by_kind[kind] for kind in ("matmul", "kernel", "other", "unestimated"))

    @property
    def communication(self) -> float:
        return sum(sums[3] for sums in self.collectives.values())

    @property
    def exposed(self) -> float:
        return sum(sums[4] for sums in self.collectives.values())


def totals(schedule: Schedule) -> Totals:
    """Of a step's schedule."""
    found, warnings = Totals(schedule.seconds), set[str]()
    for each, times in schedule.flat():
        warnings |= each.warnings
        for span in each.spans:
            found.by_kind[span.kind] += times * span.seconds
            found.by_source[span.kind, span.label] += times * span.seconds
        for c, _, is_async, exposed, _ in each.transfers:
            sums = found.collectives[Key(c.kind, c.axes, c.n, is_async)]
            for i, value in enumerate((1.0, c.bytes, c.wire, c.seconds, exposed)):
                sums[i] += times * value
            found.by_source["exposed", c.source] += times * exposed
    found.warnings = sorted(warnings)
    return found


class Walk:
    """Gives the schedule of a module's computations; each is walked once."""

    def __init__(self, module: Module, timer: Timer, mesh: Mapping[str, int]) -> None:
        """mesh: sizes by axis, in the order in which devices are numbered."""
        self.module, self.timer, self.mesh = module, timer, mesh
        self._known: dict[str, Schedule] = {}

    def step(self) -> Schedule:
        """Of the whole program."""
        return self.schedule(self.module.entry)

    def schedule(self, computation: str) -> Schedule:
        """Of a computation, its links and memory free at its start."""
        if computation not in self._known:
            clock = _Clock(self)
            for op in self.module.computations[computation]:
                if op.opcode not in _FREE:
                    clock.take(computation, op)
            self._known[computation] = clock.close()
        return self._known[computation]

    def collective(self, op: Op, outer: Op) -> Collective:
        return comm.read(self.module, op, outer, self.mesh, self.timer.chip)


class _Clock:
    """The state of a walk through one computation."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.module, self.out = walk, walk.module, Schedule()
        self.now = 0.0
        self.free: defaultdict[str, float] = defaultdict(float)  # when links and memory are
        self.running: dict[str, tuple[Collective, float, float]] = {}  # by name: the collective, its start and end
        self.copies: dict[str, float] = {}  # by name: their end

    def take(self, computation: str, op: Op) -> None:
        """Executes the next operation."""
        start, done = op.opcode.endswith("-start"), op.opcode.endswith("-done")
        if op.opcode == "while":
            count = trip_count(self.module, computation, op)
            if count is None:
                self.out.warnings.add(f"loop {op.name}: rounds unknown, counted as 1")
            self._within(op.attr("body"), 1 if count is None else count, op)
        elif op.opcode in ("call", "conditional"):
            self._longest(op)
        elif op.opcode in comm.KINDS:
            self._sync(self.walk.collective(op, op))
        elif start and comm.is_collective(op):
            self._start(op.name, self.walk.collective(op, op))
        elif op.opcode == "async-start":
            self._start_async(op)
        elif op.opcode == "async-update":
            if op.operands[0] in self.running:
                self.running[op.name] = self.running.pop(op.operands[0])
            elif op.operands[0] in self.copies:
                self.copies[op.name] = self.copies.pop(op.operands[0])
        elif op.opcode in ("copy-start", "slice-start"):
            self._copy(op.name, self._copied(op) / self.walk.timer.bandwidth)
        elif done:
            self._done(op.operands[0])
        elif op.opcode == "fusion":
            self._fusion(op)
        else:
            self._compute(op)

    def close(self) -> Schedule:
        for name in self.running:
            self.out.warnings.add(f"{name}: started, never waited for")
        self.out.seconds = self.now
        return self.out

    def _within(self, computation: str, count: int, op: Op) -> None:
        each = self.walk.schedule(computation)
        self.out.inner.append(Rounds(self.now, count, each, op.source or op.name))
        self.now += count * each.seconds

    def _longest(self, op: Op) -> None:
        _, _, branches = op.attrs.partition("branch_computations={")
        names = [each.strip(" %") for each in branches.partition("}")[0].split(",")]
        names += [op.attr(key) for key in ("to_apply", "true_computation", "false_computation")]
        known = [name for name in names if name in self.module.computations]
        if known:
            self._within(max(known, key=lambda name: self.walk.schedule(name).seconds), 1, op)

    def _compute(self, op: Op) -> None:
        cost = self.walk.timer.cost(op)
        self.out.warnings |= {cost.warning} if cost.warning else set()
        if cost.seconds:
            self.out.spans.append(Span("core", cost.kind, self.now, cost.seconds, op.source or op.name))
        self.now += cost.seconds

    def _sync(self, c: Collective) -> None:
        begin = max(self.now, *(self.free[link] for link in c.links))
        end = begin + c.seconds
        self.free.update(dict.fromkeys(c.links, end))
        self.out.transfers.append(Transfer(c, begin, False, end - self.now, self.now))
        self.now = end

    def _start(self, name: str, c: Collective) -> None:
        begin = max(self.now, *(self.free[link] for link in c.links))
        self.free.update(dict.fromkeys(c.links, begin + c.seconds))
        self.running[name] = (c, begin, begin + c.seconds)

    def _done(self, name: str) -> None:
        if name in self.running:
            c, begin, end = self.running.pop(name)
            exposed = max(0.0, end - self.now)
            self.out.transfers.append(Transfer(c, begin, True, exposed, self.now))
            self.now += exposed
        elif name in self.copies:
            waited = max(0.0, self.copies.pop(name) - self.now)
            if waited:
                self.out.spans.append(Span("core", "wait", self.now, waited, name))
            self.now += waited
        else:
            self.out.warnings.add(f"{name}: waited for, never started")

    def _copy(self, name: str, seconds: float) -> None:
        begin = max(self.now, self.free["hbm"])
        self.copies[name] = self.free["hbm"] = begin + seconds
        self.out.spans.append(Span("hbm", "transfer", begin, seconds, name))

    def _copied(self, op: Op) -> float:
        if op.opcode == "slice-start":
            return min((a.bytes for a in op.arrays if a.bytes > _LEAST_COPY), default=0.0)
        return max((a.bytes for a in self.module.inputs(op)), default=0.0)

    def _start_async(self, op: Op) -> None:
        inner = next((each for each in self.module.called(op) if each.opcode not in _FREE), None)
        found = _collective(self.module, op) or (inner and _collective(self.module, inner))
        if found:
            self._start(op.name, self.walk.collective(found, inner or op))
        else:
            self._copy(op.name, self.walk.timer.cost(inner).seconds if inner else 0.0)

    def _fusion(self, op: Op) -> None:
        """A fusion may be, start, end, or only carry along a collective."""
        c = _collective(self.module, op)
        targets = " ".join(each.attrs for each in self.module.called(op) if each.opcode == "custom-call")
        if c is None:
            self._compute(op)
        elif "AsyncCollectiveStart" in targets:
            self._start(f"channel {c.attr('channel_id')}", self.walk.collective(c, op))
        elif "AsyncCollectiveDone" in targets:
            self._done(f"channel {c.attr('channel_id')}")
        elif op.attr("calls").startswith("async_collective_fusion") or "async_collective_fusion_config" in c.attrs:
            self._compute(op)  # while the collective, started before it, goes on
        else:
            self._sync(self.walk.collective(c, op))
            if op.cycles:
                self._compute(op)


def _collective(module: Module, op: Op) -> Op | None:
    return next((each for each in module.called(op) if comm.is_collective(each)), None)
