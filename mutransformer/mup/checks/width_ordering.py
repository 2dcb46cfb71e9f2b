"""Whether wider is better: training losses of all widths at one learning rate, step by step, relative to seed noise. Pure."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from mutransformer.mup.checks.runs import Run

# Logged steps whose variances over seeds are averaged. One alone would be estimated from a few seeds; all together would hide
# that the noise is up to ten times as large where the loss falls fast, as the warm-up ends, as it is at the beginning or end.
WINDOW = 3
# Degrees of freedom of the noise for each seed beyond the first. It would be WINDOW if steps were independent, but differences at
# adjacent logged steps correlate by about 0.9. With 2, between 2 and 7 of 100 reports on equal widths fail (results/README.md).
INDEPENDENT = 2
CHANCE = 0.05  # nominal probability that a report on equal widths fails


@dataclass(frozen=True)
class WidthPair:
    """Two adjacent widths at one learning rate."""

    narrow: int
    wide: int
    steps: list[int]  # that both have logged
    difference: np.ndarray  # by step: wider's loss minus narrower's, mean over paired seeds; infinite where one diverged
    noise: np.ndarray  # by step: standard error of the difference over seeds, pooled over WINDOW steps; 0 for one seed
    seeds: int  # the number that both have

    @property
    def holds(self) -> np.ndarray:
        """Whether, at each step, the wider is worse by no more than twice the noise."""
        return self.difference <= 2 * self.noise

    @property
    def worst(self) -> int:
        """The index of the step at which the wider is worst relative to the noise."""
        return int(np.argmax(self.difference - 2 * self.noise))

    def beyond_chance(self, compared: int) -> np.ndarray:
        """The difference in nats, by step, up to which chance explains that the wider is worse in one of `compared` comparisons.

        It is the noise times Student's quantile at CHANCE / compared (Bonferroni's correction), and infinite for one seed.
        """
        if self.seeds < 2 or not self.steps:
            return np.full(len(self.steps), math.inf)
        return float(stdtrit(INDEPENDENT * (self.seeds - 1), 1 - CHANCE / compared)) * self.noise

    def __str__(self) -> str:
        return f"{self.wide} minus {self.narrow}"


@dataclass(frozen=True)
class WidthOrdering:
    """The comparison of all widths at one learning rate."""

    rate: float | None  # log2(LR); None if there is none to compare at
    curves: dict[int, tuple[list[int], np.ndarray, np.ndarray]]  # by width: steps, mean (infinite: diverged), seed spread
    pairs: list[WidthPair]
    why: str  # why some widths could not be compared; empty if all could

    @property
    def compared(self) -> int:
        return sum(len(pair.steps) for pair in self.pairs)

    @property
    def held(self) -> int:
        return sum(int(pair.holds.sum()) for pair in self.pairs)

    @property
    def better(self) -> bool | None:
        """Whether wider is better at every logged step, for every pair; None if the runs do not determine it.

        True only if it holds in every comparison and none is missing; False only if the wider diverged, or is worse by more than
        chance explains.
        """
        for pair in self.pairs:
            if np.any((pair.difference > pair.beyond_chance(self.compared)) | np.isposinf(pair.difference)):
                return False
        return None if self.why or self.held < self.compared else True


def compare_widths(runs: Sequence[Run], widths: Sequence[int], rate: float | None) -> WidthOrdering:
    """Pairs adjacent widths by seed and step, so that both of a pair have seen the same batches.

    The runs are those of one variant at any rates, the widths ascend, the rate is log2(LR); None: there is none to compare at.
    """
    if rate is None:
        return WidthOrdering(None, {}, [], f"every learning rate diverged at width {widths[0]}")
    at = {width: {run.seed: run for run in runs if run.width == width and math.log2(run.lr) == rate} for width in widths}
    present = [width for width in widths if at[width]]
    curves = {}
    for width in present:
        steps, losses = training_losses(list(at[width].values()))
        finite = np.where(np.isinf(losses), np.nan, losses)
        spread = np.std(finite, axis=0, ddof=1) if len(losses) > 1 else np.zeros(len(steps))
        curves[width] = steps.tolist(), losses.mean(axis=0), spread
    pairs = [_pair(narrow, wide, at[narrow], at[wide]) for narrow, wide in itertools.pairwise(present)]
    why = [f"no run at width {width}" for width in widths if not at[width]]
    why += [f"widths {pair.narrow} and {pair.wide} share no seed and step" for pair in pairs if not pair.steps]
    return WidthOrdering(rate, curves, pairs, "; ".join(why))


def _pair(narrow: int, wide: int, narrows: Mapping[int, Run], wides: Mapping[int, Run]) -> WidthPair:
    seeds = sorted(narrows.keys() & wides.keys())
    steps, losses = training_losses([by_seed[seed] for by_seed in (wides, narrows) for seed in seeds])
    if not len(steps):
        return WidthPair(narrow, wide, [], np.zeros(0), np.zeros(0), len(seeds))
    with np.errstate(invalid="ignore"):  # inf - inf = NaN: both diverged, so nothing to compare
        differences = losses[: len(seeds)] - losses[len(seeds) :]
        comparable = ~np.all(np.isnan(differences), axis=0)
        differences, steps = differences[:, comparable], steps[comparable]
        mean = np.nanmean(differences, axis=0)  # NaN: the wider diverged in one seed, the narrower in another
        mean = np.where(np.isnan(mean), math.inf, mean)
    return WidthPair(narrow, wide, steps.tolist(), mean, _standard_errors(differences), len(seeds))


def _standard_errors(differences: np.ndarray) -> np.ndarray:
    """Of the mean over seeds, by step. differences [seeds, steps]; a step at which one is infinite has no variance of its own."""
    seeds, steps = differences.shape
    if seeds < 2:
        return np.zeros(steps)
    finite = np.isfinite(differences).all(axis=0)
    variance = np.var(np.where(finite, differences, 0.0), axis=0, ddof=1)
    padded = (np.pad(each, WINDOW // 2) for each in (variance * finite, finite))
    sums, counts = (np.convolve(each, np.ones(WINDOW), mode="valid") for each in padded)
    return np.sqrt(sums / np.maximum(counts, 1) / seeds)


def training_losses(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all runs have logged, and their losses [runs, steps]; infinite from a run's first that is not finite."""
    steps = np.array(sorted(set.intersection(*(set(run.logged) for run in runs))) if runs else [], dtype=int)
    losses = np.array([np.array(run.train_loss, float)[np.isin(run.logged, steps)] for run in runs])  # NaN: not finite
    ends = np.array([[run.diverged_at or math.inf] for run in runs])
    return steps, np.where((steps < ends) & ~np.isnan(losses), losses, math.inf)
