"""Replays a compiled schedule in time: one core executes operations in order; links and memory transfers run beside it.

An asynchronous collective keeps its links busy from its start, and the core waits for it only where its result is used; a
synchronous one blocks the core. Collectives on the same link queue; permutes in opposite directions use different halves of it.
Transfers between HBM and VMEM queue on the HBM. A loop takes its body's time times its rounds. Time the core waits is "exposed".
On a GPU the core is the stream of kernels, and all collectives queue on one other stream.

Not modelled: contention for HBM between core, links and transfers; two mesh axes on one link; missing wraparound links;
stragglers; the host.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mutransformer.planning.compiled.cost_model import COLLECTIVES, Collective, CostModel, is_collective
from mutransformer.planning.compiled.hlo import Op, trip_count

COMPUTE = ("matmul", "kernel", "other", "unestimated")  # kinds of what the core computes
WAITS = ("wait", "exposed")  # for a memory transfer, for a collective
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "add-dependency",
    "opt-barrier",
    "domain",
}
_MIN_SLICE = 64  # bytes: the results of a slice-start hold flags besides the slice


class Span(NamedTuple):
    """Something on a lane, core or hbm. kind: on the core of COMPUTE, or what it waits for, of WAITS; on the HBM "transfer"."""

    lane: str
    kind: str
    start: float
    seconds: float
    label: str


class Transfer(NamedTuple):
    """A collective, for which the core waits for `exposed` seconds.

    beside: what the core computes between its start and where it is waited for, a count by kind, of COMPUTE or "loop"; empty if
    it is waited for at once.
    """

    collective: Collective
    start: float
    is_async: bool
    exposed: float
    beside: Mapping[str, int]
    beside_seconds: float


class Loop(NamedTuple):
    """Another computation, run n times in a row: a loop's body, or a call (n = 1)."""

    start: float
    n: int
    body: "Schedule"
    label: str


@dataclass
class Schedule:
    """What one computation does, in seconds from its start. Labels are op_names."""

    seconds: float = 0.0
    spans: list[Span] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    warnings: set[str] = field(default_factory=set)

    def flat(self, times: int = 1) -> Iterator[tuple["Schedule", int]]:
        """This schedule and all nested ones, each with how often it runs."""
        yield self, times
        for loop in self.loops:
            yield from loop.body.flat(times * loop.n)


def replay(costs: CostModel) -> Schedule:
    """The schedule of a module's program."""

    @functools.cache
    def schedule(computation: str) -> Schedule:
        """The schedule of a computation that starts with idle links and memory."""
        return _Core(costs, schedule).run(costs.module.computations[computation])

    return schedule(costs.module.entry)


class _Pending(NamedTuple):
    """A collective, or None for a memory transfer, that was started; and what the core had computed when it was."""

    collective: Collective | None
    start: float
    end: float
    is_async: bool
    computed: Counter[str]
    computed_seconds: float


class _Core:
    """The state while one computation is replayed."""

    def __init__(self, costs: CostModel, schedule: Callable[[str], Schedule]) -> None:
        """schedule: gives those of other computations."""
        self.costs, self.module, self.schedule = costs, costs.module, schedule
        self.out, self.now = Schedule(), 0.0
        self.idle_from: defaultdict[str, float] = defaultdict(float)  # by link, and "hbm"
        self.pending: dict[str, _Pending] = {}  # what was started and not yet waited for, by the operation that started it
        self.computed: Counter[str] = Counter()  # operations so far, by kind
        self.computed_seconds = 0.0

    def run(self, ops: Sequence[Op]) -> Schedule:
        for op in ops:
            if op.opcode not in _FREE:
                self._execute(op)
        self.out.warnings |= {f"{name}: started but never waited for" for name, p in self.pending.items() if p.collective}
        self.out.seconds = self.now
        return self.out

    def _execute(self, op: Op) -> None:
        if op.opcode == "while":
            rounds = trip_count(self.module, op)
            if rounds is None:
                self.out.warnings.add(f"loop {op.name}: unknown number of rounds, counted as 1")
            self._nest(op.attr("body"), 1 if rounds is None else rounds, op)
        elif op.opcode in ("call", "conditional"):
            self._nest_longest(op)
        elif op.opcode in COLLECTIVES:
            self._block(self.costs.collective(op, op))
        elif is_collective(op):
            self._start(op.name, self.costs.collective(op, op), is_async='"is_sync":true' not in op.attrs)
        elif op.opcode == "async-start":
            self._start_wrapped(op)
        elif op.opcode == "async-update":
            if op.operands[0] in self.pending:
                self.pending[op.name] = self.pending.pop(op.operands[0])
        elif op.opcode in ("copy-start", "slice-start"):
            inputs = [a.bytes for a in self.module.inputs(op)]
            slices = [a.bytes for a in op.arrays if a.bytes > _MIN_SLICE]
            size = max(inputs, default=0.0) if op.opcode == "copy-start" else min(slices, default=0.0)
            self._start_transfer(op.name, size / self.costs.bandwidth)
        elif op.opcode.endswith("-done"):
            self._wait(op.operands[0])
        elif op.opcode == "fusion":
            self._fusion(op)
        else:
            self._compute(op)

    def _nest(self, computation: str, rounds: int, op: Op) -> None:
        body = self.schedule(computation)
        # XLA:GPU may drop the name of a loop, but not those of what is in it.
        inside = (each.source for each in self.module.computations[computation] if each.source)
        self.out.loops.append(Loop(self.now, rounds, body, op.source or next(inside, op.name)))
        self._advance("loop", rounds * body.seconds)

    def _nest_longest(self, op: Op) -> None:
        names = [name.strip(" %") for name in op.find(r"branch_computations=\{([^}]*)").split(",")]
        names += [op.attr(key) for key in ("to_apply", "true_computation", "false_computation")]
        known = [name for name in names if name in self.module.computations]
        if known:
            self._nest(max(known, key=lambda name: self.schedule(name).seconds), 1, op)

    def _compute(self, op: Op) -> None:
        cost = self.costs.compute(op)
        if cost.warning:
            self.out.warnings.add(cost.warning)
        if cost.seconds:
            self.out.spans.append(Span("core", cost.kind, self.now, cost.seconds, op.source or op.name))
            self._advance(cost.kind, cost.seconds)

    def _advance(self, kind: str, seconds: float) -> None:
        self.now += seconds
        self.computed[kind] += 1
        self.computed_seconds += seconds

    def _occupy(self, resources: Sequence[str], seconds: float) -> tuple[float, float]:
        """Start and end of something that is issued now and needs resources for some time."""
        start = max(self.now, *(self.idle_from[resource] for resource in resources))
        self.idle_from.update(dict.fromkeys(resources, start + seconds))
        return start, start + seconds

    def _block(self, c: Collective) -> None:
        """A synchronous collective."""
        start, end = self._occupy(c.links, c.seconds)
        self.out.transfers.append(Transfer(c, start, False, end - self.now, {}, 0.0))
        self.out.spans.append(Span("core", "exposed", self.now, end - self.now, c.source))
        self.now = end

    def _start(self, name: str, c: Collective, is_async: bool = True) -> None:
        start, end = self._occupy(c.links, c.seconds)
        self.pending[name] = _Pending(c, start, end, is_async, Counter(self.computed), self.computed_seconds)

    def _start_transfer(self, name: str, seconds: float) -> None:
        """A transfer between HBM and VMEM."""
        start, end = self._occupy(["hbm"], seconds)
        self.pending[name] = _Pending(None, start, end, True, Counter(), 0.0)
        self.out.spans.append(Span("hbm", "transfer", start, seconds, name))

    def _wait(self, name: str) -> None:
        if name not in self.pending:
            self.out.warnings.add(f"{name}: waited for but never started")
            return
        started = self.pending.pop(name)
        c, exposed = started.collective, max(0.0, started.end - self.now)
        if c:
            beside, seconds = self.computed - started.computed, self.computed_seconds - started.computed_seconds
            self.out.transfers.append(Transfer(c, started.start, started.is_async, exposed, beside, seconds))
        if exposed:
            self.out.spans.append(Span("core", "exposed" if c else "wait", self.now, exposed, c.source if c else name))
        self.now += exposed

    def _start_wrapped(self, op: Op) -> None:
        """async-start: a collective, alone or in a fusion, or a memory transfer."""
        inner = next((each for each in self.module.called(op) if each.opcode not in _FREE), None)
        if c := self._collective_in(op) or (inner and self._collective_in(inner)):
            self._start(op.name, self.costs.collective(c, inner or c))
        else:
            self._start_transfer(op.name, self.costs.compute(inner).seconds if inner else 0.0)

    def _fusion(self, op: Op) -> None:
        """A fusion may contain no collective, be one, start or end one, or compute while one goes on."""
        c = self._collective_in(op)
        targets = " ".join(each.attrs for each in self.module.called(op) if each.opcode == "custom-call")
        if c is None:
            self._compute(op)
        elif "AsyncCollectiveStart" in targets:
            self._start(f"channel {c.attr('channel_id')}", self.costs.collective(c, op))
        elif "AsyncCollectiveDone" in targets:
            self._wait(f"channel {c.attr('channel_id')}")
        elif op.attr("calls").startswith("async_collective_fusion") or "async_collective_fusion_config" in c.attrs:
            self._compute(op)  # the collective was started by an earlier operation
        else:
            self._block(self.costs.collective(c, op))
            if op.cycles:
                self._compute(op)

    def _collective_in(self, op: Op) -> Op | None:
        return next((each for each in self.module.called(op) if is_collective(each)), None)
