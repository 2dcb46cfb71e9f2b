"""What a sweep says of transfer, as numbers: the best learning rate of each width, and its drift over widths.

Pure: from runs to frozen values. Learning rates appear as log2, losses are nats a token, drifts are octaves (factors of two).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from mutransformer.errors import check
from mutransformer.study.sweep.records import Run
from mutransformer.study.transfer.width_ordering import Order, compare


@dataclass(frozen=True)
class Cell:
    """The runs of one variant, width and learning rate: validation loss by seed, infinite where diverged."""

    losses: dict[int, float]

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(math.isinf(loss) for loss in self.losses.values())

    @property
    def mean(self) -> float:
        """Infinite if any seed diverged: a learning rate that may diverge is not one to use."""
        return float(np.mean(list(self.losses.values())))

    @property
    def spread(self) -> Optional[float]:
        """Standard deviation over seeds; None for one seed or a diverged one."""
        return None if self.diverged or len(self.losses) < 2 else float(np.std(list(self.losses.values()), ddof=1))


@dataclass(frozen=True)
class Optimum:
    """Where the best log2(LR) lies: at a point if a parabola could be put through it, else between bounds.

    Attributes:
        low, high: equal for a point; infinite where nothing bounds it.
        loss: of the parabola at its vertex; None without one.
        why: what kept the parabola away, "at the lower edge of the grid"; empty for a point.
    """

    low: float
    high: float
    loss: Optional[float]
    why: str

    @property
    def found(self) -> bool:
        return not self.why


@dataclass(frozen=True)
class Drift:
    """How far the optimum moves over the widths of a variant.

    Attributes:
        octaves: the largest optimum less the smallest; a lower bound unless found.
        found: every width's optimum is a point.
        signed: bounds of the widest width's optimum less the smallest width's; equal if both are points.
        stderr: of octaves, over seeds: the two extreme widths are compared seed by seed; None with one seed.
        signed_stderr: of signed, likewise.
        same_argmin: the best learning rate of the grid is the same at every width, Lingle's rule for "transfers".
    """

    octaves: float
    found: bool
    signed: tuple[float, float]
    stderr: Optional[float]
    signed_stderr: Optional[float]
    same_argmin: bool


@dataclass(frozen=True)
class Variant:
    """All that is known of one parametrization. Rates are log2(LR).

    Attributes:
        seeds: that were run over the grid of rates; the order of widths may rest on more.
        cells: by width and rate.
        best: by width, the rate of the grid with the lowest mean loss; None: every rate diverged.
        stderr: of the optimum, over seeds; None with one seed, or where a seed alone has none.
        penalty: by width, loss at the smallest width's best rate less the width's best loss; infinite if it diverged there, None
            if there is no run.
        off_grid: runs of other seeds.
    """

    name: str
    control: bool
    widths: list[int]
    rates: list[float]
    seeds: list[int]
    cells: dict[tuple[int, float], Cell]
    best: dict[int, Optional[float]]
    optima: dict[int, Optimum]
    stderr: dict[int, Optional[float]]
    penalty: dict[int, Optional[float]]
    drift: Drift
    order: Order
    off_grid: int

    def best_loss(self, width: int) -> float:
        """The lowest mean loss of the grid; infinite if every rate diverged."""
        rate = self.best[width]
        return math.inf if rate is None else self.cells[width, rate].mean

    @property
    def missing(self) -> int:
        """How many runs a full grid of widths, rates and seeds would have beside those that are there."""
        return len(self.widths) * len(self.rates) * len(self.seeds) - sum(len(cell.losses) for cell in self.cells.values())

    @property
    def diverged(self) -> int:
        return sum(cell.diverged for cell in self.cells.values())


def analyse(runs: Sequence[Run], controls: Sequence[str] = (), rate: Optional[float] = None) -> list[Variant]:
    """Judges nothing yet: gives the numbers of each variant, controls last.

    Args:
        runs: of one or more variants; no two with the same key.
        controls: names of variants to treat as controls, besides `sp` and those whose names start with `sp `.
        rate: log2(LR) at which widths are compared step by step; None: the best rate of each variant's smallest width.

    Raises:
        ConfigError: a control is unknown; a variant has one width only, fewer than three learning rates or runs of unequal
            length; nothing but controls; no run at rate.
    """
    names = list(dict.fromkeys(run.variant for run in runs))
    for name in controls:
        check(name in names, f"--control {name}: no such variant; there are: {', '.join(names)}")
    control = {name: name in controls or name == "sp" or name.startswith("sp ") for name in names}
    check(not all(control.values()), f"nothing to judge: {', '.join(names)}: only controls; add results of what shall transfer")
    ordered = sorted(names, key=lambda name: control[name])
    return [_variant(name, control[name], [run for run in runs if run.variant == name], rate) for name in ordered]


def _variant(name: str, control: bool, runs: list[Run], rate: Optional[float]) -> Variant:
    widths, rates = sorted({run.width for run in runs}), sorted({math.log2(run.lr) for run in runs})
    lengths = sorted({run.steps for run in runs})
    gridded = _on_grid(runs)
    check(len(widths) > 1, f"{name}: one width only ({widths[0]}): nothing to compare")
    check(len(rates) > 2, f"{name}: {len(rates)} learning rate{'s' * (len(rates) > 1)}: an optimum needs at least 3")
    check(len(lengths) == 1, f"{name}: runs of {' and '.join(map(str, lengths))} steps: losses cannot be compared")
    losses: dict[tuple[int, float], dict[int, float]] = {}
    for run in gridded:
        losses.setdefault((run.width, math.log2(run.lr)), {})[run.seed] = run.loss
    cells = {key: Cell(losses[key]) for key in sorted(losses)}
    means = {width: {r: cell.mean for (w, r), cell in cells.items() if w == width} for width in widths}
    best = {width: argmin(means[width]) for width in widths}
    optima = {width: locate(means[width], rates) for width in widths}
    vertices = {width: _vertices(width, cells, rates) for width in widths}
    tuned = best[widths[0]]
    asked = next((r for r in rates if rate is not None and math.isclose(rate, r, abs_tol=1e-9)), None)
    check(  # a control may have a grid of its own
        rate is None or asked is not None or control,
        f"--lr 2^{rate}: {name} has no run at it; there are: {', '.join(f'2^{r:.4g}' for r in rates)}",
    )
    return Variant(
        *(name, control, widths, rates, sorted({run.seed for run in gridded}), cells, best, optima),
        stderr={width: _stderr(vertices[width]) for width in widths},
        penalty={width: _penalty(means[width], best[width], tuned) for width in widths},
        drift=_drift(widths, best, optima, vertices),
        order=compare(runs, widths, tuned if asked is None else asked),
        off_grid=len(runs) - len(gridded),
    )


def _on_grid(runs: Sequence[Run]) -> list[Run]:
    """Without the seeds that a width was trained with at less than three rates, while others were at more.

    They were added to compare widths step by step with less noise; here the mean at such a rate would be one over other seeds
    than at its neighbours.
    """
    rates: dict[tuple[int, int], set[float]] = {}
    for run in runs:
        rates.setdefault((run.width, run.seed), set()).add(run.lr)
    most = {width: max(len(r) for (w, _), r in rates.items() if w == width) for width, _ in rates}
    return [run for run in runs if len(rates[run.width, run.seed]) >= min(3, most[run.width])]


def argmin(losses: Mapping[float, float]) -> Optional[float]:
    """The rate with the lowest finite loss, the lower of two equals; None if there is none."""
    finite = [rate for rate in sorted(losses) if math.isfinite(losses[rate])]
    return min(finite, key=lambda rate: losses[rate], default=None)


def locate(losses: Mapping[float, float], grid: Sequence[float]) -> Optimum:
    """The optimum by a parabola through the lowest loss and its two neighbours on the grid.

    Where a neighbour is missing or diverged there are only bounds. A neighbour that is worse bounds the optimum by the middle
    between the two, as for any curve symmetric about its minimum; one that diverged bounds it by itself.

    Args:
        losses: by log2(LR), infinite where diverged.
        grid: every log2(LR) that should be there.
    """
    best = argmin(losses)
    if best is None:
        return Optimum(-math.inf, math.inf, None, "every run diverged")
    below, above = [x for x in grid if x < best], [x for x in grid if x > best]
    sides = [("lower", below[-1:]), ("upper", above[:1])]
    why = [reason for edge, side in sides if (reason := _obstacle(edge, side, losses))]
    left = max((x for x in below if x in losses), default=-math.inf)
    right = min((x for x in above if x in losses), default=math.inf)
    if why:
        low, high = ((best + x) / 2 if math.isfinite(losses.get(x, math.inf)) else x for x in (left, right))
        return Optimum(low, high, None, "; ".join(why))
    at, loss = vertex((left, best, right), (losses[left], losses[best], losses[right]))
    return Optimum(at, at, loss, "")


def _obstacle(edge: str, neighbour: list[float], losses: Mapping[float, float]) -> str:
    if not neighbour:
        return f"at the {edge} edge of the grid"
    if neighbour[0] not in losses:
        return f"no run at its neighbour {neighbour[0]:.4g}"
    return f"its neighbour {neighbour[0]:.4g} diverged" if math.isinf(losses[neighbour[0]]) else ""


def vertex(x: tuple[float, float, float], y: tuple[float, float, float]) -> tuple[float, float]:
    """The lowest point of the parabola through three points, the middle one the lowest: place and height."""
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])  # of y = ... + curvature x^2: positive, unless all three are equal
    if curvature <= 0:
        return x[1], y[1]
    at = (x[0] + x[1]) / 2 - left / (2 * curvature)
    return at, y[1] + (at - x[1]) * (left + curvature * (at - x[0]))


def _vertices(width: int, cells: Mapping[tuple[int, float], Cell], grid: Sequence[float]) -> dict[int, Optional[float]]:
    # Each seed's own optimum; None where it has none that a parabola gives.
    seeds = sorted({seed for (w, _), cell in cells.items() if w == width for seed in cell.losses})
    found: dict[int, Optional[float]] = {}
    for seed in seeds:
        losses = {r: cell.losses[seed] for (w, r), cell in cells.items() if w == width and seed in cell.losses}
        optimum = locate(losses, grid)
        found[seed] = optimum.low if optimum.found else None
    return found


def _stderr(by_seed: Mapping[int, Optional[float]]) -> Optional[float]:
    # A seed without an optimum cannot be left out: those that remain would agree too well.
    values = [value for value in by_seed.values() if value is not None]
    if len(values) < 2 or len(values) < len(by_seed):
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _penalty(losses: Mapping[float, float], best: Optional[float], tuned: Optional[float]) -> Optional[float]:
    return None if tuned is None or best is None or tuned not in losses else losses[tuned] - losses[best]


def _drift(
    widths: list[int],
    best: Mapping[int, Optional[float]],
    optima: Mapping[int, Optimum],
    vertices: Mapping[int, Mapping[int, Optional[float]]],
) -> Drift:
    def difference_stderr(wide: int, narrow: int) -> Optional[float]:
        common = vertices[wide].keys() & vertices[narrow].keys()
        values = {seed: (vertices[wide][seed], vertices[narrow][seed]) for seed in sorted(common)}
        return _stderr({seed: None if a is None or b is None else a - b for seed, (a, b) in values.items()})

    highest, lowest = max(widths, key=lambda w: optima[w].low), min(widths, key=lambda w: optima[w].high)
    small, wide = optima[widths[0]], optima[widths[-1]]
    found = all(optimum.found for optimum in optima.values())
    return Drift(
        octaves=max(0.0, optima[highest].low - optima[lowest].high),
        found=found,
        signed=(wide.low - small.high, wide.high - small.low),
        stderr=difference_stderr(highest, lowest) if found else None,
        signed_stderr=difference_stderr(widths[-1], widths[0]) if small.found and wide.found else None,
        same_argmin=None not in best.values() and len(set(best.values())) == 1,
    )
