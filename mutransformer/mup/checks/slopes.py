"""What a coordinate check finds: how each measured number scales with width or depth, and verdicts on it. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mutransformer.mup.checks.verdict import Verdict, count

Axis = Literal["width", "depth"]
# size: mean |x|, over layers too. change: mean |x - x at step 0| on the same batch. update: mean |w - w before| of a weight.
Kind = Literal["size", "change", "update"]
KINDS: tuple[Kind, ...] = ("size", "change", "update")
# In the order of the forward pass.
ACTIVATIONS = (
    *("residual", "query", "key", "value", "rotated_query", "rotated_key", "attention_logits", "attention_output"),
    *("attention_branch", "feed_forward_hidden", "feed_forward_activation", "feed_forward_branch", "final", "logits"),
)
# Products fall with width at the start, until training has aligned their factors: judged from the second update on.
PRODUCTS = ("logits", "attention_logits")
# In the control some activation's change must grow over the widths by this factor at least. Over depth the size of the final
# residual stream is judged: largest / smallest at most, and growth in the control at least.
GROWTH, DEPTH_RATIO, DEPTH_GROWTH = 4.0, 2.5, 10.0


@dataclass(frozen=True)
class Coordinate:
    """One measured number."""

    variant: str  # the parametrization
    at: int  # the model's width or depth
    seed: int  # of weights and batch
    step: int  # updates completed
    kind: Kind
    name: str  # of the activation (Forward.intermediates) or, for an update, of the weight
    value: float  # not finite if the run diverged


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
    fits = []
    for key in sorted(groups, key=lambda key: (variants.index(key[0]), rank[key[1]], rank.get(key[2], 0))):
        at, seeds = (sorted(set(numbers)) for numbers in zip(*groups[key], strict=True))
        by_seed = np.array([[groups[key][a, seed] for seed in seeds] for a in at])
        means = by_seed.mean(axis=1)
        spread = float(np.std([_slope(at, column) for column in by_seed.T], ddof=1)) if len(seeds) > 1 else None
        fits.append(SlopeFit(*key, at, means.tolist(), _slope(at, means), spread))
    return fits


def _slope(at: Sequence[int], values: np.ndarray) -> float:
    positive = np.isfinite(values).all() and (values > 0).all()
    return float(np.polyfit(np.log(at), np.log(values), 1)[0]) if positive else math.nan


def judge(fits: Sequence[SlopeFit], subject: str, control: str | None, axis: Axis, max_slope: float) -> list[Verdict]:
    """The verdict on the checked variant, and on whether the control fails as it should.

    Over width, |d log(mean |x|) / d log(width)| of the checked variant may be at most max_slope.
    """
    if axis == "depth":
        fits = [fit for fit in fits if (fit.kind, fit.name) == ("size", "final")]
    subjects, controls = ([fit for fit in fits if fit.variant == variant] for variant in (subject, control))
    flat = _flat_over_width(subjects, max_slope) if axis == "width" else _flat_over_depth(subjects)
    no_control = Verdict("WARNING", "no control: nothing shows that this check can fail")
    return [flat, no_control if control is None else _grows(controls, axis)]


def counts(fit: SlopeFit) -> bool:
    """Whether a fit is judged: sizes, of products from the second update on; changes, from the second update on.

    Sizes that are zero at every width, as of queries at the start with model.q_init=zero, are not.
    """
    if fit.kind == "update" or (fit.kind == "size" and not any(fit.means)):
        return False
    return fit.step >= (2 if fit.kind == "change" or fit.name in PRODUCTS else 0)


def _flat_over_width(fits: list[SlopeFit], max_slope: float) -> Verdict:
    judged = [fit for fit in fits if counts(fit)]
    worst = max(judged, key=lambda fit: math.inf if math.isnan(fit.slope) else abs(fit.slope))
    outside, n = sum(not abs(fit.slope) <= max_slope for fit in judged), len(judged)
    text = f"{worst.variant}: {'not flat' if outside else 'flat'} over widths {worst.at[0]} to {worst.at[-1]}: "
    text += f"{outside} of {n} slopes outside" if outside else f"{n} slopes within"
    text += f" ±{max_slope:g}; the steepest, {worst}, is the {worst.kind} of {worst.name} after {count(worst.step, 'update')}"
    return Verdict("FAIL" if outside else "PASS", text)


def _flat_over_depth(fits: list[SlopeFit]) -> Verdict:
    worst = max(fits, key=lambda fit: fit.ratio)
    flat = worst.ratio <= DEPTH_RATIO
    text = f"{worst.variant}: the final residual stream is {'flat' if flat else 'not flat'} over depths {worst.at[0]} to "
    text += f"{worst.at[-1]}: largest / smallest size at most {worst.ratio:.2f}, after {count(worst.step, 'update')}"
    return Verdict("PASS" if flat else "FAIL", f"{text} (at most {DEPTH_RATIO:g} allowed)")


def _grows(fits: list[SlopeFit], axis: Axis) -> Verdict:
    """On the control, after the last update: over width by the change that grows most, over depth by the final size."""
    last = max(fit.step for fit in fits)
    kind = "size" if axis == "depth" else "change"
    most = max((fit for fit in fits if (fit.kind, fit.step) == (kind, last)), key=lambda fit: fit.growth)
    least = DEPTH_GROWTH if axis == "depth" else GROWTH
    grows, factor = most.growth >= least, f"{most.growth:.1f} times as"
    what = f"the final residual stream is {factor} large" if axis == "depth" else f"{most.name} changes {factor} much"
    text = f"the control {most.variant} {'grows, as it should' if grows else 'does not grow'}: {what} at {axis} {most.at[-1]} as "
    text += f"at {most.at[0]} after {count(last, 'update')} (at least {least:g} required)"
    return Verdict("PASS" if grows else "FAIL", text)
