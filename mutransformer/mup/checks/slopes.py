"""What a coordinate check finds: how each measured number scales with width or depth, and verdicts on it. Pure.

The exponents of a parametrization are multiples of 1/2, so that a wrong one shows as a slope that is off by 1/2 or more. A slope
fails if it differs from the expected one by more than half of that, two standard errors allowed for.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from mutransformer.mup.checks.verdict import Verdict, count
from mutransformer.mup.text import aligned

Axis = Literal["width", "depth"]
# size: mean |x|, over layers too. change: mean |x - x at step 0| on the same batch. update: mean |w - w before| of a weight.
# decay: the share of a weight that weight decay removes in one update.
Kind = Literal["size", "change", "update", "decay"]
KINDS: tuple[Kind, ...] = ("size", "change", "update", "decay")
# In the order of the forward pass.
ACTIVATIONS = (
    "residual",
    "query",
    "key",
    "value",
    "rotated_query",
    "rotated_key",
    "attention_logits",
    "attention_output",
    "attention_branch",
    "feed_forward_hidden",
    "feed_forward_activation",
    "feed_forward_branch",
    "final",
    "logits",
)
# How muP's updates under Adam and Lion scale with a weight's fan-in, by role; 0 for the others. Written down here, not derived
# from RULES, which are what is checked.
UPDATES = {"input": 0.0, "hidden": -1.0, "residual": -1.0, "output": -1.0}
MAX_SLOPE = 0.25  # the largest difference from an expected slope that passes
STANDARD_ERRORS = 2.0  # of a slope, that are allowed for
ZERO_UPDATES = 3  # that a weight may have at first: behind unembedding, residual projection and queries that start at zero
# Over a factor r of sizes: some activation's change must grow in the control by r^this; over depth the final residual stream may
# differ by r^the second, and must grow in the control by r^the third.
GROWTH, DEPTH_RATIO, DEPTH_GROWTH = 0.5, 1 / 3, 5 / 6


@dataclass(frozen=True)
class Coordinate:
    """One measured number."""

    variant: str  # the parametrization
    at: int  # the model's width or depth
    seed: int  # of weights and batch
    step: int  # updates completed
    kind: Kind
    name: str  # of the activation or, for updates and decay, of the weight
    value: float  # not finite if the run diverged


class Expected(NamedTuple):
    """The slopes over width of a correct parametrization; 0 for what is not listed.

    Changes and the share that decay removes have slope 0. Sizes have that of their start, until training outweighs it.
    """

    start: Mapping[str, float]  # by activation: of its size before training
    update: Mapping[str, float]  # by weight: of its update
    readouts: frozenset[str] = frozenset()  # activations without a growing dim: may start with any slope in -1/2 ... 0
    vectors: frozenset[str] = frozenset()  # gains and biases, which should not decay


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
    stderr: float = 0.0  # of the slope, by the spreads of all steps, since that of one step is itself uncertain; 0 for one seed

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
        fits.append((SlopeFit(*key, at, means.tolist(), _slope(at, means), spread), len(seeds)))
    squares: dict[tuple[str, Kind, str], list[float]] = {}
    for fit, n_seeds in fits:
        if fit.spread is not None and math.isfinite(fit.spread):
            squares.setdefault((fit.variant, fit.kind, fit.name), []).append(fit.spread**2 / n_seeds)
    pooled = {key: math.sqrt(np.mean(values)) for key, values in squares.items()}
    return [replace(fit, stderr=pooled.get((fit.variant, fit.kind, fit.name), 0.0)) for fit, _ in fits]


def slope_table(fits: Sequence[SlopeFit], axis: Axis) -> str:
    """Slopes and their spread over seeds: a row for each variant, kind and name, a column for a few of the steps."""
    last = max(fit.step for fit in fits)
    shown = sorted({0, 1, 2, last // 2, last})
    cells = {(fit.variant, fit.kind, fit.name, fit.step): str(fit) for fit in fits}
    head = (f"slope over {axis}", "", "", *(f"step {step}" for step in shown))
    rows = [(*row, *(cells.get((*row, step), "") for step in shown)) for row in dict.fromkeys(key[:-1] for key in cells)]
    return aligned([head, *rows])


def csv_text(coordinates: Sequence[Coordinate]) -> str:
    """One line for each, below a line of column names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Coordinate))
    writer.writerows((*astuple(c)[:-1], f"{c.value:.6g}") for c in coordinates)
    return text.getvalue()


def _slope(at: Sequence[int], values: np.ndarray) -> float:
    positive = np.isfinite(values).all() and (values > 0).all()
    return float(np.polyfit(np.log(at), np.log(values), 1)[0]) if positive else math.nan


class Deviation(NamedTuple):
    """A slope beside the one that is expected."""

    fit: SlopeFit
    expected: float

    @property
    def excess(self) -> float:
        """By how much the difference is larger than its noise; infinite if there is no slope."""
        if math.isnan(self.fit.slope):
            return math.inf
        return abs(self.fit.slope - self.expected) - STANDARD_ERRORS * self.fit.stderr

    def __str__(self) -> str:
        fit, expected = self.fit, f", where {self.expected:+.2f} is expected" if self.expected else ""
        when = f"after {count(fit.step, 'update')}" if fit.step else "before training"
        return f"{fit.kind} of {fit.name} {when}: {fit.slope:+.3f} ± {fit.stderr:.3f}{expected}"


def deviations(fits: Sequence[SlopeFit], expected: Expected) -> list[Deviation]:
    """What is judged of one variant over width, from the furthest from its expected slope to the nearest.

    Sizes before training and from the second update on, unless they are zero at every width, as of queries with
    model.q_init=zero. Changes from the second update on: that of the first varies most with the seed. Updates, of which the
    first may be zero, as behind weights that start at zero.
    """
    by_key = {(fit.kind, fit.name, fit.step): fit for fit in fits}
    found = []
    for fit in fits:
        zero = not any(fit.means)
        if fit.kind == "size" and fit.step != 1 and not zero:
            found.append(Deviation(fit, _expected_size(fit, by_key, expected)))
        elif fit.kind == "change" and fit.step >= 2:
            found.append(Deviation(fit, 0.0))
        elif fit.kind == "update" and (fit.step > ZERO_UPDATES or not zero):
            found.append(Deviation(fit, expected.update.get(fit.name, 0.0)))
        elif fit.kind == "decay" and not zero:
            found.append(Deviation(fit, 0.0))
    return sorted(found, key=lambda each: each.excess, reverse=True)


def _expected_size(fit: SlopeFit, by_key: Mapping[Any, SlopeFit], expected: Expected) -> float:
    """The slope of sqrt(start^2 + change^2): the start has its own slope, the change none, and neither knows of the other."""
    start, change = by_key.get(("size", fit.name, 0)), by_key.get(("change", fit.name, fit.step))
    slope = expected.start.get(fit.name, 0.0)
    if fit.name in expected.readouts and start is not None and math.isfinite(start.slope):
        slope = min(max(start.slope, -0.5), 0.0)
    if slope == 0 or start is None or change is None:
        return slope if fit.step == 0 else 0.0
    sizes = np.array(fit.at, float)
    first = start.means[0] * (sizes / sizes[0]) ** slope
    changes = [mean for mean in change.means if 0 < mean < math.inf]
    moved = math.exp(np.mean(np.log(changes))) if changes else 0.0
    return _slope(fit.at, np.hypot(first, moved))


def judge(
    fits: Sequence[SlopeFit], expected: Expected, subject: str, control: str | None, axis: Axis, max_slope: float = MAX_SLOPE
) -> list[Verdict]:
    """The verdict on the checked variant, a warning if its gains or biases decay, and whether the control fails as it should.

    Over width no slope d log(mean |x|) / d log(width) of the checked variant may differ from the expected one by more than
    max_slope and two standard errors.
    """
    if axis == "depth":
        fits = [fit for fit in fits if (fit.kind, fit.name) == ("size", "final")]
    subjects, controls = ([fit for fit in fits if fit.variant == variant] for variant in (subject, control))
    flat = _as_expected(deviations(subjects, expected), max_slope) if axis == "width" else _flat_over_depth(subjects)
    no_control = Verdict("WARNING", "no control: nothing shows that this check can fail")
    decaying = (fit.name for fit in subjects if fit.kind == "decay" and fit.name in expected.vectors and any(fit.means))
    shrunk = list(dict.fromkeys(decaying))
    decays = f"{subject}: weight decay also shrinks gains and biases: {', '.join(shrunk)}"
    warnings = [Verdict("WARNING", decays)] if shrunk else []
    return [flat, *warnings, no_control if control is None else _grows(controls, axis)]


def _as_expected(found: Sequence[Deviation], max_slope: float) -> Verdict:
    worst, n = found[0].fit, len(found)
    outside = [each for each in found if not each.excess <= max_slope]
    over, limit = f"over widths {worst.at[0]} to {worst.at[-1]}", f"±{max_slope:g} and two standard errors"
    if not outside:
        return Verdict("PASS", f"{worst.variant}: {n} slopes {over} are as expected, within {limit}; the furthest: {found[0]}")
    names = list(dict.fromkeys(f"{each.fit.kind} of {each.fit.name}" for each in outside))
    also = f"; also {', '.join(names[1:4])}{', ...' if len(names) > 4 else ''}" if len(names) > 1 else ""
    text = f"{worst.variant}: {len(outside)} of {n} slopes {over} are not as expected, by more than {limit}"
    return Verdict("FAIL", f"{text}; the furthest: {found[0]}{also}")


def _flat_over_depth(fits: list[SlopeFit]) -> Verdict:
    worst = max(fits, key=lambda fit: fit.ratio)
    limit = (worst.at[-1] / worst.at[0]) ** DEPTH_RATIO
    flat = worst.ratio <= limit
    text = f"{worst.variant}: the final residual stream is {'flat' if flat else 'not flat'} over depths {worst.at[0]} to "
    text += f"{worst.at[-1]}: largest / smallest size at most {worst.ratio:.2f}, after {count(worst.step, 'update')}"
    return Verdict("PASS" if flat else "FAIL", f"{text} (at most {limit:.2f} allowed)")


def _grows(fits: list[SlopeFit], axis: Axis) -> Verdict:
    """On the control, after the last update: over width by the change that grows most, over depth by the final size."""
    last = max(fit.step for fit in fits)
    kind = "size" if axis == "depth" else "change"
    most = max((fit for fit in fits if (fit.kind, fit.step) == (kind, last)), key=lambda fit: fit.growth)
    least = (most.at[-1] / most.at[0]) ** (DEPTH_GROWTH if axis == "depth" else GROWTH)
    grows, factor = most.growth >= least, f"{most.growth:.1f} times as"
    what = f"the final residual stream is {factor} large" if axis == "depth" else f"{most.name} changes {factor} much"
    text = f"the control {most.variant} {'grows, as it should' if grows else 'does not grow'}: {what} at {axis} {most.at[-1]} as "
    text += f"at {most.at[0]} after {count(last, 'update')} (at least {least:.1f} required)"
    return Verdict("PASS" if grows else "FAIL", text)
