"""The best learning rate of one curve of losses, and how far a coarse grid may have moved it. Pure.

Learning rates are given as log2, losses in nats per token, infinite where a run diverged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

RESOLUTION = 1000  # points at which a cubic is searched for its minimum, between two rates
# Of the spacing of the rates: the least uncertainty of an optimum. Curves whose shape changes with size move the vertex by up to
# 0.1 of the spacing without a trace in the other curves (tests/test_optimum.py).
LEAST = 0.05


@dataclass(frozen=True)
class Bounds:
    """Where a number in log2(LR) lies; a point if low == high, infinite where there is no bound."""

    low: float
    high: float
    stderr: float | None = None  # over seeds
    loss: float | None = None  # of an optimum: of the parabola at its vertex; None without one
    why: str = ""  # of an optimum: why no parabola could be fitted, as "at the lower edge of its grid, 2^-9"
    grid: float | None = None  # the standard uncertainty that the spacing of the rates leaves; None unless a point
    others: Mapping[str, float] = field(default_factory=dict)  # of an optimum: its place by other curves, see `other_places`
    spacing: float = 0.0  # of an optimum: the wider of the two steps to the neighbors

    @property
    def is_point(self) -> bool:
        return self.low == self.high

    @property
    def uncertainty(self) -> float:
        """Seeds and grid together, as independent."""
        return math.hypot(self.stderr or 0.0, self.grid or 0.0)

    def __str__(self) -> str:
        if self.is_point:
            parts = [f"{error:.2f} ({of})" for error, of in ((self.stderr, "seeds"), (self.grid, "grid")) if error is not None]
            return " ± ".join([f"{self.low:.2f}", *parts])
        if math.isinf(self.low):
            return "unknown" if math.isinf(self.high) else f"≤ {self.high:.2f}"
        return f"≥ {self.low:.2f}" if math.isinf(self.high) else f"{self.low:.2f} to {self.high:.2f}"


def argmin(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest finite loss, the lower of two equals; None if there is none."""
    return min((rate for rate in sorted(losses) if math.isfinite(losses[rate])), key=lambda rate: losses[rate], default=None)


def locate(losses: Mapping[float, float]) -> Bounds:
    """The optimum of losses by log2(LR): a point if a parabola could be fitted through the lowest and its two neighbors.

    Where the lowest has no neighbor, or one that diverged, there are only bounds. A neighbor with a higher loss bounds the
    optimum by the midpoint of the two, as for any curve symmetric about its minimum; one that diverged bounds it by itself.
    """
    best = argmin(losses)
    if best is None:
        return Bounds(-math.inf, math.inf, why="every run diverged")
    x = sorted(losses)
    at = x.index(best)
    left, right = x[at - 1] if at else -math.inf, x[at + 1] if at + 1 < len(x) else math.inf
    why: list[str] = []
    for edge, neighbor in (("lower", left), ("upper", right)):
        if math.isinf(neighbor):
            why.append(f"at the {edge} edge of its grid, 2^{best:.4g}")
        elif math.isinf(losses[neighbor]):
            why.append(f"its neighbor 2^{neighbor:.4g} diverged")
    if why:
        low, high = ((best + x) / 2 if math.isfinite(losses.get(x, math.inf)) else x for x in (left, right))
        return Bounds(low, high, why="; ".join(why))
    place, loss = vertex((left, best, right), (losses[left], losses[best], losses[right]))
    others, spacing = other_places(losses, at), max(best - left, right - best)
    distances = [other - place for other in others.values()] or [spacing / 2]
    grid = max(root_mean_square(distances), LEAST * spacing)
    return Bounds(place, place, loss=loss, grid=grid, others=others, spacing=spacing)


def vertex(x: tuple[float, float, float], y: tuple[float, float, float]) -> tuple[float, float]:
    """The vertex (place, height) of the parabola through three points, of which the middle one is the lowest."""
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])  # of y = ... + curvature x^2: positive, unless all three are equal
    if curvature <= 0:
        return x[1], y[1]
    at = (x[0] + x[1]) / 2 - left / (2 * curvature)
    return at, y[1] + (at - x[1]) * (left + curvature * (at - x[0]))


def other_places(losses: Mapping[float, float], at: int) -> dict[str, float]:
    """The minimum by curves that also pass through a second neighbor of the lowest loss, the one at index `at` of the rates.

    On each side that has a finite second neighbor there are two: the cubic through the four points, and the parabola through the
    three points of that side alone, the lowest included. The first follows a skewed curve, the second one that is much steeper on
    the other side. All are limited to the range of the neighbors. For an exact parabola they agree with its vertex.
    """
    x, places = sorted(losses), {}
    y = [losses[rate] for rate in x]
    for side, step in (("left", -1), ("right", 1)):
        end = at + 2 * step
        if not (0 <= end < len(x) and math.isfinite(y[end])):
            continue
        four = slice(at - 2, at + 2) if step < 0 else slice(at - 1, at + 3)
        places[f"cubic {side}"] = _cubic_minimum(x[four], y[four], x[at - 1], x[at + 1])
        places[f"parabola {side}"] = _one_sided([x[at + step * i] for i in range(3)], [y[at + step * i] for i in range(3)], x, at)
    return places


def _cubic_minimum(x: Sequence[float], y: Sequence[float], low: float, high: float) -> float:
    places = np.linspace(low, high, 2 * RESOLUTION + 1)
    heights = np.polynomial.Polynomial.fit(x, y, 3)(places)
    i = int(np.argmin(heights))
    if i in (0, len(places) - 1):
        return float(places[i])
    (a, b, c), (left, lowest, right) = places[i - 1 : i + 2].tolist(), heights[i - 1 : i + 2].tolist()
    return vertex((a, b, c), (left, lowest, right))[0]


def _one_sided(a: Sequence[float], b: Sequence[float], x: Sequence[float], at: int) -> float:
    """The vertex of the parabola through three points on one side, the lowest first; the far neighbor if it has none."""
    near, far = (b[1] - b[0]) / (a[1] - a[0]), (b[2] - b[1]) / (a[2] - a[1])
    curvature = (far - near) / (a[2] - a[0])
    beyond = x[at + 1] if a[1] < a[0] else x[at - 1]
    if curvature <= 0:
        return beyond
    return min(max((a[0] + a[1]) / 2 - near / (2 * curvature), x[at - 1]), x[at + 1])


def root_mean_square(numbers: Sequence[float]) -> float:
    return math.sqrt(sum(number**2 for number in numbers) / len(numbers))


def standard_error(values: Sequence[float | None]) -> float | None:
    """Of the mean of one value for each seed; None for one seed, or if a seed has none.

    A seed without a value cannot be left out: those that remain would agree too well.
    """
    found = [value for value in values if value is not None]
    return float(np.std(found, ddof=1) / math.sqrt(len(found))) if len(found) == len(values) > 1 else None


def combine(terms: Sequence[tuple[float, Bounds]]) -> Bounds:
    """The sum of factor x optimum, of optima that are points, without a standard error.

    Its uncertainty of the grid: each of the other curves is fitted at all sizes alike, so that an error common to them cancels,
    but for the least that the spacing leaves. If they share no such curve, their own uncertainties are added as independent.
    """
    total = sum(factor * optimum.low for factor, optimum in terms)
    names = [name for name in terms[0][1].others if all(name in optimum.others for _, optimum in terms)]
    shifts = [sum(factor * optimum.others[name] for factor, optimum in terms) - total for name in names]
    least = math.hypot(*(factor * LEAST * optimum.spacing for factor, optimum in terms))
    alone = math.hypot(*(factor * (optimum.grid or 0.0) for factor, optimum in terms))
    return Bounds(total, total, grid=max(root_mean_square(shifts), least) if shifts else alone)
