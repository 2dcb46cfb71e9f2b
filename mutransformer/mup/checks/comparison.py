"""Whether transfer pays: a variant at the one rate tuned at its smallest size against another tuned at every size. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mutransformer.mup.checks.optimum import standard_error
from mutransformer.mup.checks.transfer import Variant


@dataclass(frozen=True)
class TunedComparison:
    """Two variants at one size. Losses in nats per token, means over all seeds of a variant; infinite where one diverged."""

    subject: str
    other: str
    size: int
    rate: float  # log2(LR): the best of the subject's smallest size
    loss: float | None  # the subject's at that rate; None: no run
    other_rate: float | None  # the best of the other's grid at this size; None: every rate diverged
    other_loss: float
    difference: float | None  # the subject's minus the other's at those rates, mean over the seeds that both have; None: no seed
    stderr: float | None  # of the difference, paired by seed; None for one seed
    seeds: int  # that both have
    vertex: float | None  # the other's loss at the vertex of its parabola; None without one


def compare_tuned(variants: Sequence[Variant]) -> list[TunedComparison]:
    """Each variant that should transfer against each control, at the sizes of both.

    Without a control the first variant takes its place. A variant of which every rate diverged at the smallest size is left out.
    """
    others = [variant for variant in variants if variant.control] or list(variants[:1])
    pairs = [(subject, other) for other in others for subject in variants if not subject.control and subject is not other]
    return [_compare(a, b, size) for a, b in pairs if a.tuned is not None for size in a.sizes if size in b.fits]


def _compare(subject: Variant, other: Variant, size: int) -> TunedComparison:
    rate, ours, theirs = subject.tuned, subject.fits[size], other.fits[size]
    assert rate is not None
    a = ours.cells[rate].losses if rate in ours.cells else {}
    b = {} if theirs.best is None else theirs.cells[theirs.best].losses
    seeds = sorted(a.keys() & b.keys())
    differences = [a[seed] - b[seed] for seed in seeds]
    finite = all(map(math.isfinite, differences))
    return TunedComparison(
        subject=subject.name,
        other=other.name,
        size=size,
        rate=rate,
        loss=ours.losses.get(rate),
        other_rate=theirs.best,
        other_loss=theirs.best_loss,
        difference=float(np.mean(differences)) if seeds else None,
        stderr=standard_error(differences) if finite else None,
        seeds=len(seeds),
        vertex=theirs.optimum.loss,
    )
