"""Whether wider is better: training loss of all widths at one learning rate, step by step, against the noise of seeds. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from mutransformer.study.sweep.records import Run


@dataclass(frozen=True)
class Pair:
    """Two neighbouring widths at one learning rate, over the steps that both have logged.

    Attributes:
        difference: the wider's training loss less the narrower's at each step, paired by seed, mean over seeds; infinite where
            one diverged.
        noise: standard error of a difference: the seeds' standard deviation, pooled over steps; 0 with one seed.
        seeds: how many.
    """

    narrow: int
    wide: int
    steps: list[int]
    difference: np.ndarray
    noise: float
    seeds: int

    @property
    def holds(self) -> np.ndarray:
        """By step: the wider is not worse by more than twice the noise."""
        return self.difference <= 2 * self.noise


@dataclass(frozen=True)
class Order:
    """Training loss of all widths at one learning rate.

    Attributes:
        rate: log2(LR); None if there is none to compare at.
        curves: by width: steps, mean training loss over seeds (infinite where diverged), its standard deviation.
        pairs: of neighbouring widths.
        why: what kept some widths from being compared; empty if nothing did.
    """

    rate: Optional[float]
    curves: dict[int, tuple[list[int], np.ndarray, np.ndarray]]
    pairs: list[Pair]
    why: str

    @property
    def compared(self) -> int:
        return sum(len(pair.steps) for pair in self.pairs)

    @property
    def held(self) -> int:
        return sum(int(pair.holds.sum()) for pair in self.pairs)

    @property
    def better(self) -> bool:
        """Wider is better at every logged step, for every pair of neighbouring widths."""
        return not self.why and self.compared == self.held


def compare(runs: Sequence[Run], widths: Sequence[int], rate: Optional[float]) -> Order:
    """Pairs neighbouring widths by seed and step, so that both of a pair have seen the same batches.

    Args:
        runs: of one variant, at any rates.
        widths: ascending.
        rate: log2(LR); None if the smallest width has no best one.
    """
    if rate is None:
        return Order(None, {}, [], f"every learning rate diverged at width {widths[0]}")
    at = {width: {run.seed: run for run in runs if run.width == width and math.log2(run.lr) == rate} for width in widths}
    absent = [width for width in widths if not at[width]]
    present = [width for width in widths if at[width]]
    curves = {width: _curve(at[width]) for width in present}
    pairs = [_pair(narrow, wide, at[narrow], at[wide]) for narrow, wide in zip(present, present[1:], strict=False)]
    apart = [f"widths {pair.narrow} and {pair.wide} share no seed and step" for pair in pairs if not pair.steps]
    none = [f"no run at width {width}" for width in absent]
    return Order(rate, curves, pairs, "; ".join(none + apart))


def _curve(by_seed: Mapping[int, Run]) -> tuple[list[int], np.ndarray, np.ndarray]:
    steps = sorted(set.intersection(*(set(run.logged) for run in by_seed.values())))
    losses = np.array([training_losses(run, steps) for run in by_seed.values()])
    finite = np.where(np.isinf(losses), np.nan, losses)
    spread = np.std(finite, axis=0, ddof=1) if len(losses) > 1 else np.zeros(len(steps))
    return steps, losses.mean(axis=0), spread


def _pair(narrow: int, wide: int, narrows: Mapping[int, Run], wides: Mapping[int, Run]) -> Pair:
    seeds = sorted(narrows.keys() & wides.keys())
    logged = [set(run.logged) for seed in seeds for run in (narrows[seed], wides[seed])]
    steps = np.array(sorted(set.intersection(*logged)) if logged else [], dtype=int)
    if not len(steps):
        return Pair(narrow, wide, [], np.zeros(0), 0.0, len(seeds))
    with np.errstate(invalid="ignore"):  # inf - inf: both diverged, which says nothing
        differences = np.array([training_losses(wides[s], steps) - training_losses(narrows[s], steps) for s in seeds])
        told = ~np.all(np.isnan(differences), axis=0)
        differences, steps = differences[:, told], steps[told]
        mean = np.nanmean(differences, axis=0)  # NaN: in one seed the wider diverged, in another the narrower
        mean = np.where(np.isnan(mean), math.inf, mean)
    finite = np.isfinite(differences).all(axis=0)
    variance = np.var(differences[:, finite], axis=0, ddof=1) if len(seeds) > 1 and finite.any() else np.zeros(1)
    return Pair(narrow, wide, [int(step) for step in steps], mean, float(np.sqrt(variance.mean() / len(seeds))), len(seeds))


def training_losses(run: Run, steps: Sequence[int] | np.ndarray) -> np.ndarray:
    """The training losses of these logged steps; infinite where not finite, and from there on, where they mean nothing."""
    at = dict(zip(run.logged, run.train_loss, strict=True))
    last = math.inf if run.diverged_at is None else run.diverged_at
    losses = [at[int(step)] if step < last else None for step in steps]
    return np.array([math.inf if loss is None else loss for loss in losses])
