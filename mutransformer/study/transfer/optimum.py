"""The best learning rate of a grid: the vertex of the parabola through the lowest loss and its two neighbors, or bounds. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Where a number in log2(LR) lies; a point if low == high, infinite where there is no bound."""

    low: float
    high: float
    stderr: float | None = None

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
class Optimum:
    """The best log2(LR): a point if a parabola could be fitted."""

    at: Bounds
    loss: float | None  # of the parabola at its vertex; None without one
    why: str  # why no parabola could be fitted, as "at the lower edge of the grid"; empty for a point


def argmin(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest finite loss, the lower of two equals; None if there is none."""
    return min((rate for rate in sorted(losses) if math.isfinite(losses[rate])), key=lambda rate: losses[rate], default=None)


def locate(losses: Mapping[float, float], grid: Sequence[float]) -> Optimum:
    """The optimum of one width.

    Where a neighbor of the lowest loss is missing or diverged there are only bounds. A neighbor with a higher loss bounds the
    optimum by the midpoint of the two, as for any curve symmetric about its minimum; one that diverged bounds it by itself.
    Losses are by log2(LR), infinite where diverged; the grid is every log2(LR) expected, ascending.
    """
    best = argmin(losses)
    if best is None:
        return Optimum(Bounds(-math.inf, math.inf), None, "every run diverged")
    below, above = [x for x in grid if x < best], [x for x in grid if x > best]
    sides = [("lower", below[-1:]), ("upper", above[:1])]
    why = [reason for edge, side in sides if (reason := _obstacle(edge, side, losses))]
    left = max((x for x in below if x in losses), default=-math.inf)
    right = min((x for x in above if x in losses), default=math.inf)
    if why:
        low, high = ((best + x) / 2 if math.isfinite(losses.get(x, math.inf)) else x for x in (left, right))
        return Optimum(Bounds(low, high), None, "; ".join(why))
    at, loss = vertex((left, best, right), (losses[left], losses[best], losses[right]))
    return Optimum(Bounds(at, at), loss, "")


def _obstacle(edge: str, neighbor: list[float], losses: Mapping[float, float]) -> str:
    if not neighbor:
        return f"at the {edge} edge of the grid"
    if neighbor[0] not in losses:
        return f"no run at its neighbor {neighbor[0]:.4g}"
    return f"its neighbor {neighbor[0]:.4g} diverged" if math.isinf(losses[neighbor[0]]) else ""


def vertex(x: tuple[float, float, float], y: tuple[float, float, float]) -> tuple[float, float]:
    """The vertex (place, height) of the parabola through three points, of which the middle one is the lowest."""
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])  # of y = ... + curvature x^2: positive, unless all three are equal
    if curvature <= 0:
        return x[1], y[1]
    at = (x[0] + x[1]) / 2 - left / (2 * curvature)
    return at, y[1] + (at - x[1]) * (left + curvature * (at - x[0]))
