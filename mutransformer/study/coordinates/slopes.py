"""Slopes of a coordinate check: how each measured number scales with width or depth. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mutransformer.study.coordinates.measure import Coordinate, Kind

KINDS: tuple[Kind, ...] = ("size", "change", "update")
# In the order of the forward pass.
ACTIVATIONS = (
    *("residual", "query", "key", "value", "rotated_query", "rotated_key", "attention_logits", "attention_output"),
    *("attention_branch", "feed_forward_hidden", "feed_forward_activation", "feed_forward_branch", "final", "logits"),
)


@dataclass(frozen=True)
class SlopeFit:
    """One kind of number of one activation or weight at one step, against width or depth."""

    variant: str
    kind: Kind
    name: str
    step: int
    at: list[int]  # widths or depths, ascending
    means: list[float]  # over seeds
    slope: float  # of log(mean) against log(at), least squares; NaN if a mean is zero or not finite
    spread: float | None  # standard deviation of the slopes of single seeds; None for one seed

    @property
    def growth(self) -> float:
        """The last mean / the first; infinite if only the last is not finite; 1 if both are zero or the first is not finite."""
        first, last = self.means[0], self.means[-1]
        if not math.isfinite(first) or first == last == 0:
            return 1.0
        return last / first if first and math.isfinite(last) else math.inf

    @property
    def ratio(self) -> float:
        """The largest mean / the smallest; infinite if one is zero or not finite."""
        return max(self.means) / min(self.means) if all(0 < mean < math.inf for mean in self.means) else math.inf

    def __str__(self) -> str:
        return f"{self.slope:+.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")


def fit_slopes(coordinates: Sequence[Coordinate]) -> list[SlopeFit]:
    """A fit for each variant, kind, name and step, in this order; activations as in the forward pass."""
    groups: dict[tuple[str, Kind, str, int], dict[tuple[int, int], float]] = {}
    for c in coordinates:
        groups.setdefault((c.variant, c.kind, c.name, c.step), {})[c.at, c.seed] = c.value
    variants = list(dict.fromkeys(variant for variant, *_ in groups))
    rank = {name: i for i, name in enumerate((*KINDS, *ACTIVATIONS))}
    ordered = sorted(groups, key=lambda key: (variants.index(key[0]), rank[key[1]], rank.get(key[2], 0)))
    return [_fit(*key, groups[key]) for key in ordered]


def _fit(variant: str, kind: Kind, name: str, step: int, values: dict[tuple[int, int], float]) -> SlopeFit:
    at, seeds = sorted({a for a, _ in values}), sorted({s for _, s in values})
    by_seed = np.array([[values[a, s] for s in seeds] for a in at])
    means = by_seed.mean(axis=1)
    spread = float(np.std([_slope(at, column) for column in by_seed.T], ddof=1)) if len(seeds) > 1 else None
    return SlopeFit(variant, kind, name, step, at, means.tolist(), _slope(at, means), spread)


def _slope(at: Sequence[int], values: np.ndarray) -> float:
    if not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan
    return float(np.polyfit(np.log(at), np.log(values), 1)[0])
