"""The numbers of a transfer report: each width's best learning rate, and how far it drifts over the widths. Pure.

Learning rates are given as log2, losses in nats per token, infinite where a run diverged, and drifts in octaves (factors of two).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mutransformer.mup.checks.runs import Run
from mutransformer.mup.checks.verdict import count, require
from mutransformer.mup.checks.width_ordering import WidthOrdering, compare_widths


@dataclass(frozen=True)
class Bounds:
    """Where a number in log2(LR) lies; a point if low == high, infinite where there is no bound."""

    low: float
    high: float
    stderr: float | None = None
    loss: float | None = None  # of an optimum: of the parabola at its vertex; None without one
    why: str = ""  # of an optimum: why no parabola could be fitted, as "at the lower edge of the grid"

    @property
    def is_point(self) -> bool:
        return self.low == self.high

    def __str__(self) -> str:
        if self.is_point:
            return f"{self.low:.2f}" + ("" if self.stderr is None else f" ± {self.stderr:.2f}")
        if math.isinf(self.low):
            return "unknown" if math.isinf(self.high) else f"≤ {self.high:.2f}"
        return f"≥ {self.low:.2f}" if math.isinf(self.high) else f"{self.low:.2f} to {self.high:.2f}"


@dataclass(frozen=True)
class Cell:
    """The runs of one variant, width and learning rate: validation loss by seed, infinite where diverged."""

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
class WidthFit:
    """The learning rates of one width."""

    cells: dict[float, Cell]  # by rate, ascending
    best: float | None  # the rate with the lowest mean loss; None: every rate diverged
    optimum: Bounds  # of the mean losses, with a standard error unless there is one seed or one without an optimum
    seed_optima: dict[int, float | None]  # of each seed's own losses; None where no parabola could be fitted

    @property
    def best_loss(self) -> float:
        """The lowest mean loss of the grid."""
        return math.inf if self.best is None else self.cells[self.best].mean

    def penalty(self, rate: float | None) -> float | None:
        """The mean loss at a rate minus the lowest; infinite if it diverged there, None if there is no run or no lowest."""
        return None if self.best is None or rate not in self.cells else self.cells[rate].mean - self.best_loss


@dataclass(frozen=True)
class Variant:
    """The results of one parametrization."""

    name: str
    control: bool  # it should not transfer, and decides nothing
    rates: list[float]  # ascending
    seeds: list[int]  # that were run over the grid of rates; the comparison of widths may use more
    fits: dict[int, WidthFit]  # by width, ascending
    ordering: WidthOrdering
    off_grid: int  # the number of runs with other seeds

    @property
    def widths(self) -> list[int]:
        return list(self.fits)

    @property
    def title(self) -> str:
        return self.name + " (control)" * self.control

    @property
    def tuned(self) -> float | None:
        """The best rate of the narrowest width."""
        return self.fits[self.widths[0]].best

    @property
    def same_best(self) -> bool:
        """Whether the best rate of the grid is the same at every width, the criterion of Lingle (arXiv 2404.05728)."""
        return self.tuned is not None and all(fit.best == self.tuned for fit in self.fits.values())

    @property
    def drift(self) -> Bounds:
        """The largest optimum of all widths minus the smallest: a point, or a lower bound if some optimum is not found."""
        fits = self.fits.values()
        highest, lowest = max(fits, key=lambda fit: fit.optimum.low), min(fits, key=lambda fit: fit.optimum.high)
        octaves = max(0.0, highest.optimum.low - lowest.optimum.high)
        found = all(fit.optimum.is_point for fit in fits)
        return Bounds(octaves, octaves, _paired_stderr(highest, lowest)) if found else Bounds(octaves, math.inf)

    @property
    def signed_drift(self) -> Bounds:
        """The widest width's optimum minus the narrowest's."""
        narrow, wide = self.fits[self.widths[0]], self.fits[self.widths[-1]]
        a, b = narrow.optimum, wide.optimum
        return Bounds(b.low - a.high, b.high - a.low, _paired_stderr(wide, narrow) if a.is_point and b.is_point else None)

    @property
    def missing(self) -> int:
        """The number of runs that a full grid of widths, rates and seeds would have in addition."""
        present = sum(len(cell.losses) for fit in self.fits.values() for cell in fit.cells.values())
        return len(self.fits) * len(self.rates) * len(self.seeds) - present

    @property
    def diverged(self) -> int:
        return sum(cell.diverged for fit in self.fits.values() for cell in fit.cells.values())


def analyze(runs: Sequence[Run], controls: Sequence[str] = (), rate: float | None = None) -> list[Variant]:
    """The numbers of each variant, controls last.

    No two runs may have the same key. Controls are the variants of these names, `sp` and those whose names start with `sp `. The
    rate is the log2(LR) at which widths are compared step by step; None: the best one of each variant's narrowest width.

    Raises CheckError if a control is unknown; a variant has one width only, fewer than three learning rates, runs of unequal
    length, or no run at `rate`; or all variants are controls.
    """
    names = list(dict.fromkeys(run.variant for run in runs))
    for name in controls:
        require(name in names, f"--control {name}: no such variant; there are: {', '.join(names)}")
    control = {name: name in controls or name == "sp" or name.startswith("sp ") for name in names}
    require(not all(control.values()), f"nothing to judge: {', '.join(names)}: only controls; add a variant that should transfer")
    ordered = sorted(names, key=lambda name: control[name])
    return [_variant(name, control[name], [run for run in runs if run.variant == name], rate) for name in ordered]


def _variant(name: str, control: bool, runs: list[Run], rate: float | None) -> Variant:
    widths, rates = sorted({run.width for run in runs}), sorted({math.log2(run.lr) for run in runs})
    lengths = sorted({run.steps for run in runs})
    require(len(widths) > 1, f"{name}: one width only ({widths[0]}): nothing to compare")
    require(len(rates) > 2, f"{name}: {count(len(rates), 'learning rate')}: an optimum needs at least 3")
    require(len(lengths) == 1, f"{name}: runs of {' and '.join(map(str, lengths))} steps: losses cannot be compared")
    chosen = next((r for r in rates if rate is not None and math.isclose(rate, r, abs_tol=1e-9)), None)
    listed = ", ".join(f"2^{r:.4g}" for r in rates)
    # A control may have its own grid.
    require(rate is None or chosen is not None or control, f"--lr 2^{rate}: {name} has no run at it; there are: {listed}")
    on_grid = _on_grid(runs)
    fits = {width: _fit([run for run in on_grid if run.width == width], rates) for width in widths}
    ordering = compare_widths(runs, widths, fits[widths[0]].best if chosen is None else chosen)
    return Variant(name, control, rates, sorted({run.seed for run in on_grid}), fits, ordering, len(runs) - len(on_grid))


def _on_grid(runs: Sequence[Run]) -> list[Run]:
    """The runs without those seeds that a width has at fewer than three rates while it has others at more.

    Such seeds were added to compare widths step by step with less noise; the mean at their rate would be over other seeds than
    at the neighboring rates.
    """
    n_rates = Counter((run.width, run.seed) for run in runs)
    most = {width: max(n for (other, _), n in n_rates.items() if other == width) for width, _ in n_rates}
    return [run for run in runs if n_rates[run.width, run.seed] >= min(3, most[run.width])]


def _fit(runs: Sequence[Run], grid: Sequence[float]) -> WidthFit:
    cells: dict[float, Cell] = {}
    for run in sorted(runs, key=lambda run: run.lr):
        cells.setdefault(math.log2(run.lr), Cell({})).losses[run.seed] = run.loss
    seed_optima: dict[int, float | None] = {}
    for seed in sorted({run.seed for run in runs}):
        at = locate({rate: cell.losses[seed] for rate, cell in cells.items() if seed in cell.losses}, grid)
        seed_optima[seed] = at.low if at.is_point else None
    means = {rate: cell.mean for rate, cell in cells.items()}
    optimum = replace(locate(means, grid), stderr=_stderr(list(seed_optima.values())))
    return WidthFit(cells, argmin(means), optimum, seed_optima)


def _stderr(by_seed: Sequence[float | None]) -> float | None:
    # A seed without a value cannot be left out: those that remain would agree too well.
    values = [value for value in by_seed if value is not None]
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) == len(by_seed) > 1 else None


def _paired_stderr(a: WidthFit, b: WidthFit) -> float | None:
    """The standard error of the difference of two optima, paired by seed."""
    pairs = [(a.seed_optima[seed], b.seed_optima[seed]) for seed in sorted(a.seed_optima.keys() & b.seed_optima.keys())]
    return _stderr([None if x is None or y is None else x - y for x, y in pairs])


def argmin(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest finite loss, the lower of two equals; None if there is none."""
    return min((rate for rate in sorted(losses) if math.isfinite(losses[rate])), key=lambda rate: losses[rate], default=None)


def locate(losses: Mapping[float, float], grid: Sequence[float]) -> Bounds:
    """The optimum of one width: a point if a parabola could be fitted.

    Where a neighbor of the lowest loss is missing or diverged there are only bounds. A neighbor with a higher loss bounds the
    optimum by the midpoint of the two, as for any curve symmetric about its minimum; one that diverged bounds it by itself.
    Losses are by log2(LR); the grid is every log2(LR) expected, ascending.
    """
    best = argmin(losses)
    if best is None:
        return Bounds(-math.inf, math.inf, why="every run diverged")
    below, above = [x for x in grid if x < best], [x for x in grid if x > best]
    why: list[str] = []
    for edge, neighbor in (("lower", below[-1:]), ("upper", above[:1])):
        if not neighbor:
            why.append(f"at the {edge} edge of the grid")
        elif neighbor[0] not in losses:
            why.append(f"no run at its neighbor {neighbor[0]:.4g}")
        elif math.isinf(losses[neighbor[0]]):
            why.append(f"its neighbor {neighbor[0]:.4g} diverged")
    left = max((x for x in below if x in losses), default=-math.inf)
    right = min((x for x in above if x in losses), default=math.inf)
    if why:
        low, high = ((best + x) / 2 if math.isfinite(losses.get(x, math.inf)) else x for x in (left, right))
        return Bounds(low, high, why="; ".join(why))
    at, loss = vertex((left, best, right), (losses[left], losses[best], losses[right]))
    return Bounds(at, at, loss=loss)


def vertex(x: tuple[float, float, float], y: tuple[float, float, float]) -> tuple[float, float]:
    """The vertex (place, height) of the parabola through three points, of which the middle one is the lowest."""
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])  # of y = ... + curvature x^2: positive, unless all three are equal
    if curvature <= 0:
        return x[1], y[1]
    at = (x[0] + x[1]) / 2 - left / (2 * curvature)
    return at, y[1] + (at - x[1]) * (left + curvature * (at - x[0]))
