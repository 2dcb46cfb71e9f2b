"""Replays a compiled schedule in time: one core executes operations in order; links and memory transfers run beside it.

An asynchronous collective keeps its links busy from its start, and the core waits for it only where its result is used; a
synchronous one blocks the core. Collectives on the same link queue; permutes in opposite directions use different halves of it.
Transfers between HBM and VMEM queue on the HBM. A loop takes its body's time times its rounds. Time the core waits is "exposed".

Not modelled: contention for HBM between core, links and transfers; two mesh axes on one link; missing wraparound links;
stragglers; the host.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mutransformer.planning.compiled import collectives
from mutransformer.planning.compiled.collectives import Collective, is_collective
from mutransformer.planning.compiled.hlo import Module, Op
from mutransformer.planning.compiled.op_cost import CostModel
from mutransformer.planning.compiled.schedule import Loop, Schedule, Span, Transfer
from mutransformer.planning.compiled.trip_count import trip_count

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("add-dependency", "opt-barrier", "domain"),
}
_MIN_SLICE = 64  # bytes: the results of a slice-start hold flags besides the slice


class Replay:
    """Schedules of a module's computations; each is replayed once."""

    def __init__(self, module: Module, costs: CostModel, mesh: Mapping[str, int]) -> None:
        """mesh: sizes by axis, in the order in which devices are numbered."""
        self.module, self.costs, self.mesh = module, costs, mesh
        self._schedules: dict[str, Schedule] = {}

    def step(self) -> Schedule:
        """The schedule of the program."""
        return self.schedule(self.module.entry)

    def schedule(self, computation: str) -> Schedule:
        """The schedule of a computation that starts with idle links and memory."""
        if computation not in self._schedules:
            core = _Core(self)
            for op in self.module.computations[computation]:
                if op.opcode not in _FREE:
                    core.execute(op)
            self._schedules[computation] = core.finish()
        return self._schedules[computation]

    def collective(self, op: Op, outer: Op | None = None) -> Collective:
        """A collective, and the fusion or wrapper around it."""
        return collectives.read_collective(self.module, op, outer or op, self.mesh, self.costs.chip)


class _Pending(NamedTuple):
    """Something asynchronous that was started: a collective, or (None) a memory transfer."""

    collective: Collective | None
    start: float
    end: float


class _Core:
    """The state while one computation is replayed."""

    def __init__(self, replay: Replay) -> None:
        self.replay, self.module, self.out = replay, replay.module, Schedule()
        self.now = 0.0
        self.idle_from: defaultdict[str, float] = defaultdict(float)  # by link, and "hbm"
        self.pending: dict[str, _Pending] = {}  # by the name of the operation that started it

    def execute(self, op: Op) -> None:
        """Executes the next operation."""
        if op.opcode == "while":
            rounds = trip_count(self.module, op)
            if rounds is None:
                self.out.warnings.add(f"loop {op.name}: unknown number of rounds, counted as 1")
            self._run(op.attr("body"), 1 if rounds is None else rounds, op)
        elif op.opcode in ("call", "conditional"):
            self._run_longest(op)
        elif op.opcode in collectives.KINDS:
            self._block(self.replay.collective(op))
        elif is_collective(op):
            self._start(op.name, self.replay.collective(op))
        elif op.opcode == "async-start":
            self._start_wrapped(op)
        elif op.opcode == "async-update":
            if op.operands[0] in self.pending:
                self.pending[op.name] = self.pending.pop(op.operands[0])
        elif op.opcode in ("copy-start", "slice-start"):
            inputs = [a.bytes for a in self.module.inputs(op)]
            slices = [a.bytes for a in op.arrays if a.bytes > _MIN_SLICE]
            size = max(inputs, default=0.0) if op.opcode == "copy-start" else min(slices, default=0.0)
            self._start_transfer(op.name, size / self.replay.costs.bandwidth)
        elif op.opcode.endswith("-done"):
            self._wait(op.operands[0])
        elif op.opcode == "fusion":
            self._fusion(op)
        else:
            self._compute(op)

    def finish(self) -> Schedule:
        """The schedule of the operations executed so far."""
        for name, pending in self.pending.items():
            if pending.collective:
                self.out.warnings.add(f"{name}: started but never waited for")
        self.out.seconds = self.now
        return self.out

    def _run(self, computation: str, rounds: int, op: Op) -> None:
        body = self.replay.schedule(computation)
        self.out.loops.append(Loop(self.now, rounds, body, op.source or op.name))
        self.now += rounds * body.seconds

    def _run_longest(self, op: Op) -> None:
        names = [name.strip(" %") for name in op.find(r"branch_computations=\{([^}]*)").split(",")]
        names += [op.attr(key) for key in ("to_apply", "true_computation", "false_computation")]
        known = [name for name in names if name in self.module.computations]
        if known:
            self._run(max(known, key=lambda name: self.replay.schedule(name).seconds), 1, op)

    def _compute(self, op: Op) -> None:
        cost = self.replay.costs.cost(op)
        if cost.warning:
            self.out.warnings.add(cost.warning)
        if cost.seconds:
            self.out.spans.append(Span("core", cost.kind, self.now, cost.seconds, op.source or op.name))
        self.now += cost.seconds

    def _occupy(self, resources: Sequence[str], seconds: float) -> tuple[float, float]:
        """Start and end of something that is issued now and needs resources for some time."""
        start = max(self.now, *(self.idle_from[resource] for resource in resources))
        self.idle_from.update(dict.fromkeys(resources, start + seconds))
        return start, start + seconds

    def _block(self, c: Collective) -> None:
        """A synchronous collective."""
        start, end = self._occupy(c.links, c.seconds)
        self.out.transfers.append(Transfer(c, start, False, end - self.now, self.now))
        self.now = end

    def _start(self, name: str, c: Collective) -> None:
        self.pending[name] = _Pending(c, *self._occupy(c.links, c.seconds))

    def _start_transfer(self, name: str, seconds: float) -> None:
        """A transfer between HBM and VMEM."""
        self.pending[name] = _Pending(None, *self._occupy(["hbm"], seconds))
        self.out.spans.append(Span("hbm", "transfer", self.pending[name].start, seconds, name))

    def _wait(self, name: str) -> None:
        if name not in self.pending:
            self.out.warnings.add(f"{name}: waited for but never started")
            return
        c, start, end = self.pending.pop(name)
        exposed = max(0.0, end - self.now)
        if c:
            self.out.transfers.append(Transfer(c, start, True, exposed, self.now))
        elif exposed:
            self.out.spans.append(Span("core", "wait", self.now, exposed, name))
        self.now += exposed

    def _start_wrapped(self, op: Op) -> None:
        """async-start: a collective, alone or in a fusion, or a memory transfer."""
        inner = next((each for each in self.module.called(op) if each.opcode not in _FREE), None)
        if c := self._collective_in(op) or (inner and self._collective_in(inner)):
            self._start(op.name, self.replay.collective(c, inner))
        else:
            self._start_transfer(op.name, self.replay.costs.cost(inner).seconds if inner else 0.0)

    def _fusion(self, op: Op) -> None:
        """A fusion may contain no collective, be one, start or end one, or compute while one goes on."""
        c = self._collective_in(op)
        targets = " ".join(each.attrs for each in self.module.called(op) if each.opcode == "custom-call")
        if c is None:
            self._compute(op)
        elif "AsyncCollectiveStart" in targets:
            self._start(f"channel {c.attr('channel_id')}", self.replay.collective(c, op))
        elif "AsyncCollectiveDone" in targets:
            self._wait(f"channel {c.attr('channel_id')}")
        elif op.attr("calls").startswith("async_collective_fusion") or "async_collective_fusion_config" in c.attrs:
            self._compute(op)  # the collective was started by an earlier operation
        else:
            self._block(self.replay.collective(c, op))
            if op.cycles:
                self._compute(op)

    def _collective_in(self, op: Op) -> Op | None:
        return next((each for each in self.module.called(op) if is_collective(each)), None)
