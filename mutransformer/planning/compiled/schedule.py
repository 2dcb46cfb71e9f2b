"""A step's schedule in time, and its totals."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mutransformer.planning.compiled.collectives import Collective

COMPUTE = ("matmul", "kernel", "other", "unestimated")  # kinds of what the core computes


class Span(NamedTuple):
    """Something on a lane, core or hbm. kind: on the core of COMPUTE, or "wait" for a memory transfer; on the HBM "transfer"."""

    lane: str
    kind: str
    start: float
    seconds: float
    label: str


class Transfer(NamedTuple):
    """A collective. From `waits_at` on, the core waits for it for `exposed` seconds."""

    collective: Collective
    start: float
    is_async: bool
    exposed: float
    waits_at: float


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


class CollectiveKey(NamedTuple):
    """What collectives are grouped by in the totals; n: devices in a group."""

    kind: str
    axes: tuple[str, ...]
    n: int
    is_async: bool


@dataclass
class CollectiveTotals:
    """Sums over the collectives of one key in a step."""

    count: float = 0.0
    bytes: float = 0.0
    wire_bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass(frozen=True)
class Totals:
    """Sums over a step on one device.

    Attributes:
        by_kind: seconds of spans.
        collectives: the slowest first.
        costliest: seconds by kind and op_name, most first; the kind of a collective's exposed time is "exposed".
        communication_seconds: collectives, exposed or hidden.
        exposed_seconds: for which the core waits for collectives.
    """

    seconds: float
    by_kind: dict[str, float]
    collectives: dict[CollectiveKey, CollectiveTotals]
    costliest: dict[tuple[str, str], float]
    warnings: list[str]
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float


def totals(schedule: Schedule) -> Totals:
    """The totals of a step's schedule."""
    by_kind: dict[str, float] = {kind: 0.0 for kind in (*COMPUTE, "wait", "transfer")}
    by_source: defaultdict[tuple[str, str], float] = defaultdict(float)
    collectives: defaultdict[CollectiveKey, CollectiveTotals] = defaultdict(CollectiveTotals)
    warnings: set[str] = set()
    for each, times in schedule.flat():
        warnings |= each.warnings
        for span in each.spans:
            by_kind[span.kind] += times * span.seconds
            by_source[span.kind, span.label] += times * span.seconds
        for c, _, is_async, exposed, _ in each.transfers:
            sums = collectives[CollectiveKey(c.kind, c.axes, c.n, is_async)]
            sums.count += times
            sums.bytes += times * c.bytes
            sums.wire_bytes += times * c.wire_bytes
            sums.seconds += times * c.seconds
            sums.exposed_seconds += times * exposed
            by_source["exposed", c.source] += times * exposed
    return Totals(
        schedule.seconds,
        by_kind,
        dict(sorted(collectives.items(), key=lambda item: -item[1].seconds)),
        {key: seconds for key, seconds in sorted(by_source.items(), key=lambda item: -item[1]) if seconds},
        sorted(warnings),
        compute_seconds=sum(by_kind[kind] for kind in COMPUTE),
        communication_seconds=sum((sums.seconds for sums in collectives.values()), 0.0),
        exposed_seconds=sum((sums.exposed_seconds for sums in collectives.values()), 0.0),
    )
