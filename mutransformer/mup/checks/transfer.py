"""The numbers of a transfer report: each size's best learning rate, and how far it drifts as the model grows. Pure.

Sizes are widths, or whatever else an axis counts. Learning rates are given as log2, losses in nats per token, infinite where a
run diverged, and drifts in octaves (factors of two).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mutransformer.mup.checks.optimum import Bounds, argmin, combine, locate, standard_error
from mutransformer.mup.checks.runs import WIDTH, Run, ScalingAxis
from mutransformer.mup.checks.verdict import count, require
from mutransformer.mup.checks.width_ordering import WidthOrdering, compare_widths


@dataclass(frozen=True)
class Cell:
    """The runs of one variant, size and learning rate: validation loss by seed, infinite where diverged."""

    losses: dict[int, float]

    @property
    def diverged(self) -> int:
        """The number of diverged runs."""
        return sum(map(math.isinf, self.losses.values()))

    @property
    def mean(self) -> float:
        """Infinite if any seed diverged: such a learning rate is not safe to use."""
        return float(np.mean(list(self.losses.values())))

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed or a diverged one."""
        return None if self.diverged or len(self.losses) < 2 else float(np.std(list(self.losses.values()), ddof=1))

    def __str__(self) -> str:
        if self.diverged:
            return "diverged" if self.diverged == len(self.losses) else f"diverged ({self.diverged} of {len(self.losses)})"
        return f"{self.mean:.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")


@dataclass(frozen=True)
class SizeFit:
    """The learning rates of one size."""

    cells: dict[float, Cell]  # by rate, ascending
    losses: dict[float, float]  # by rate: the mean over seeds, see `mean_losses`
    best: float | None  # the rate with the lowest of these; None: every rate diverged
    optimum: Bounds  # of these, with a standard error unless there is one seed or one without an optimum
    seed_optima: dict[int, float | None]  # of each seed's own losses; None where no parabola could be fitted

    @property
    def best_loss(self) -> float:
        """The lowest mean loss of the grid."""
        return math.inf if self.best is None else self.losses[self.best]

    @property
    def seeds(self) -> list[int]:
        return sorted(set[int]().union(*(cell.losses for cell in self.cells.values())))

    def penalty(self, rate: float | None) -> float | None:
        """The mean loss at a rate minus the lowest; infinite if it diverged there, None if there is no run or no lowest."""
        return None if self.best is None or rate not in self.losses else self.losses[rate] - self.best_loss


@dataclass(frozen=True)
class Gap:
    """Runs that are missing at one size and learning rate, as log2."""

    size: int
    rate: float
    seeds: list[int]


@dataclass(frozen=True)
class Variant:
    """The results of one parametrization."""

    name: str
    control: bool  # it should not transfer, and decides nothing
    axis: ScalingAxis
    fits: dict[int, SizeFit]  # by size, ascending; each has its own grid of rates and its own seeds
    ordering: WidthOrdering | None  # None: not judged over this axis
    off_grid: int  # the number of runs with seeds that only the comparison of widths uses

    @property
    def sizes(self) -> list[int]:
        return list(self.fits)

    @property
    def rates(self) -> list[float]:
        """Those of any size, ascending."""
        return sorted({rate for fit in self.fits.values() for rate in fit.cells})

    @property
    def seeds(self) -> list[int]:
        """Those of any size, ascending."""
        return sorted({seed for fit in self.fits.values() for seed in fit.seeds})

    @property
    def title(self) -> str:
        return f"{self.name} (control)" if self.control else self.name

    @property
    def tuned(self) -> float | None:
        """The best rate of the smallest size."""
        return self.fits[self.sizes[0]].best

    @property
    def same_best(self) -> bool:
        """Whether the best rate of the grid is the same at every size, the criterion of Lingle (arXiv 2404.05728)."""
        return self.tuned is not None and all(fit.best == self.tuned for fit in self.fits.values())

    @property
    def drift(self) -> Bounds:
        """The largest optimum of all sizes minus the smallest: a point, or a lower bound if some optimum is not found."""
        fits = self.fits.values()
        highest, lowest = max(fits, key=lambda fit: fit.optimum.low), min(fits, key=lambda fit: fit.optimum.high)
        if all(fit.optimum.is_point for fit in fits):
            return _difference(highest, lowest)
        return Bounds(max(0.0, highest.optimum.low - lowest.optimum.high), math.inf)

    @property
    def signed_drift(self) -> Bounds:
        """The largest size's optimum minus the smallest's."""
        small, large = self.fits[self.sizes[0]], self.fits[self.sizes[-1]]
        a, b = small.optimum, large.optimum
        return _difference(large, small) if a.is_point and b.is_point else Bounds(b.low - a.high, b.high - a.low)

    @property
    def missing(self) -> list[Gap]:
        """The runs that the grid lacks, by size and rate.

        At each size these are the rates that it has, with all of its seeds, and the rates within its range that most sizes have.
        A narrower grid of rates, or fewer seeds, than at another size is no gap.
        """
        common = Counter(rate for fit in self.fits.values() for rate in fit.cells)
        gaps = []
        for size, fit in self.fits.items():
            rates = list(fit.cells)
            within = {rate for rate, n in common.items() if 2 * n > len(self.fits) and rates[0] < rate < rates[-1]}
            for rate in sorted(within.union(rates)):
                absent = [seed for seed in fit.seeds if rate not in fit.cells or seed not in fit.cells[rate].losses]
                gaps += [Gap(size, rate, absent)] if absent else []
        return gaps

    @property
    def diverged(self) -> int:
        return sum(cell.diverged for fit in self.fits.values() for cell in fit.cells.values())


def analyze(
    runs: Sequence[Run], controls: Sequence[str] = (), rate: float | None = None, axis: ScalingAxis = WIDTH
) -> list[Variant]:
    """The numbers of each variant, controls last.

    Controls are the variants of these names, `sp` and those whose names start with `sp `. The rate is the log2(LR) at which
    widths are compared step by step; None: the best one of each variant's narrowest width.

    Raises CheckError if a control is unknown; a variant has one size only, fewer than three learning rates, two runs of the same
    size, learning rate and seed, runs of unequal length where the axis is not their length, or no run at `rate`; or all variants
    are controls.
    """
    names = list(dict.fromkeys(run.variant for run in runs))
    for name in controls:
        require(name in names, f"--control {name}: no such variant; there are: {', '.join(names)}")
    control = {name: name in controls or name == "sp" or name.startswith("sp ") for name in names}
    require(not all(control.values()), f"nothing to judge: {', '.join(names)}: only controls; add a variant that should transfer")
    ordered = sorted(names, key=lambda name: control[name])
    return [_variant(name, control[name], [run for run in runs if run.variant == name], rate, axis) for name in ordered]


def _variant(name: str, control: bool, runs: list[Run], rate: float | None, axis: ScalingAxis) -> Variant:
    by_size: dict[int, list[Run]] = {size: [] for size in sorted({axis.size(run) for run in runs})}
    for run in runs:
        by_size[axis.size(run)].append(run)
    sizes, rates = list(by_size), sorted({math.log2(run.lr) for run in runs})
    require(len(sizes) > 1, f"{name}: one {axis.name} only ({sizes[0]}): nothing to compare")
    require(len(rates) > 2, f"{name}: {count(len(rates), 'learning rate')}: an optimum needs at least 3")
    for lengths in (
        [{run.steps for run in runs}] if axis.wider_is_better else [{run.steps for run in of} for of in by_size.values()]
    ):
        require(len(lengths) == 1, f"{name}: runs of {' and '.join(map(str, sorted(lengths)))} steps: losses cannot be compared")
    for size, of in by_size.items():
        (lr, seed), n = Counter((run.lr, run.seed) for run in of).most_common(1)[0]
        where = f"{axis.label(size)}, learning rate 2^{math.log2(lr):.4g}, seed {seed}"
        require(n == 1, f"{name}: {n} runs of {where}: they differ in something else; name them apart, or choose another --over")
    chosen = next((r for r in rates if rate is not None and math.isclose(rate, r, abs_tol=1e-9)), None)
    listed = ", ".join(f"2^{r:.4g}" for r in rates)
    # A control may have its own grid.
    require(rate is None or chosen is not None or control, f"--lr 2^{rate}: {name} has no run at it; there are: {listed}")
    on_grid = {size: _on_grid(of) for size, of in by_size.items()}
    fits = {size: _fit(of) for size, of in on_grid.items()}
    at = fits[sizes[0]].best if chosen is None else chosen
    ordering = compare_widths(runs, sizes, at) if axis.wider_is_better else None
    return Variant(name, control, axis, fits, ordering, len(runs) - sum(map(len, on_grid.values())))


def _on_grid(runs: Sequence[Run]) -> list[Run]:
    """The runs of one size without those of seeds at fewer than three rates, if there are seeds at more.

    Such seeds were added to compare widths step by step with less noise.
    """
    n_rates = Counter(run.seed for run in runs)
    return [run for run in runs if n_rates[run.seed] >= min(3, max(n_rates.values()))]


def _fit(runs: Sequence[Run]) -> SizeFit:
    cells: dict[float, Cell] = {}
    for run in sorted(runs, key=lambda run: run.lr):
        cells.setdefault(math.log2(run.lr), Cell({})).losses[run.seed] = run.loss
    losses = mean_losses(cells)
    seeds = {run.seed for run in runs}
    # Seeds are compared on the rates that all have: their optima by unequal grids would differ by more than noise.
    shared = [rate for rate, cell in cells.items() if cell.losses.keys() == seeds]
    seed_optima: dict[int, float | None] = {}
    for seed in sorted(seeds):
        rates = shared if len(shared) > 2 else [rate for rate, cell in cells.items() if seed in cell.losses]
        at = locate({rate: cells[rate].losses[seed] for rate in rates})
        seed_optima[seed] = at.low if at.is_point else None
    optimum = replace(locate(losses), stderr=standard_error(list(seed_optima.values())))
    return SizeFit(cells, losses, argmin(losses), optimum, seed_optima)


def mean_losses(cells: Mapping[float, Cell]) -> dict[float, float]:
    """The mean loss at each rate, over all seeds of the size; infinite where one diverged.

    Where a rate lacks seeds, a plain mean would mix the rate's effect with that of its seeds. The mean is then that of the model
    loss = f(rate) + g(seed), by least squares over the runs there are. A rate that shares no seed with the others is left out.
    """
    finite = {rate: cell.losses for rate, cell in cells.items() if not cell.diverged}
    if len({frozenset(losses) for losses in finite.values()}) < 2:
        return {rate: cell.mean for rate, cell in cells.items()}
    groups: list[tuple[list[float], set[int]]] = []  # rates that are connected by seeds
    for rate, losses in finite.items():
        joined = [group for group in groups if group[1] & losses.keys()]
        groups = [group for group in groups if group not in joined]
        groups.append((sum((rates for rates, _ in joined), [rate]), set(losses).union(*(seeds for _, seeds in joined))))
    rates, seeds = (sorted(part) for part in max(groups, key=lambda group: sum(len(finite[rate]) for rate in group[0])))
    points = [(rates.index(rate), seeds.index(seed), loss) for rate in rates for seed, loss in finite[rate].items()]
    design = np.zeros((len(points) + 1, len(rates) + len(seeds)))
    for row, (i, j, _) in enumerate(points):
        design[row, i] = design[row, len(rates) + j] = 1
    design[-1, len(rates) :] = 1  # the seeds' effects add up to zero
    found = np.linalg.lstsq(design, np.array([*(loss for *_, loss in points), 0.0]), rcond=None)[0]
    adjusted = dict(zip(rates, found.tolist(), strict=False))
    return {rate: adjusted.get(rate, math.inf) for rate, cell in cells.items() if rate in adjusted or cell.diverged}


def _difference(a: SizeFit, b: SizeFit) -> Bounds:
    """The optimum of one size minus that of another, both points; seeds are paired where they are the same."""
    pairs = [(a.seed_optima[seed], b.seed_optima[seed]) for seed in sorted(a.seed_optima.keys() & b.seed_optima.keys())]
    stderr = standard_error([None if x is None or y is None else x - y for x, y in pairs])
    if stderr is None and a.optimum.stderr is not None and b.optimum.stderr is not None:
        stderr = math.hypot(a.optimum.stderr, b.optimum.stderr)
    return replace(combine([(1.0, a.optimum), (-1.0, b.optimum)]), stderr=stderr)
