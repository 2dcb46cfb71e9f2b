"""A coordinate check's numbers as slopes and verdicts. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from mutransformer.study.coordinates.measure import Axis, Coordinate, Kind
from mutransformer.study.verdicts import Verdict

KINDS: tuple[Kind, ...] = ("size", "change", "update")
# As they come in the forward pass.
ACTIVATIONS = (
    *("residual", "query", "key", "value", "rotated_query", "rotated_key", "attention_logits", "attention_output"),
    *("attention_branch", "feed_forward_hidden", "feed_forward_activation", "feed_forward_branch", "final", "logits"),
)
# They fall at the start, before training has aligned what they are products of, and are not judged until the second update.
PRODUCTS = ("logits", "attention_logits")


@dataclass(frozen=True)
class Limits:
    """What passes.

    Attributes:
        slope: |d log(mean |x|) / d log(width)| of the parametrization that is judged.
        growth: factor by which some activation's change must grow over the widths in the control.
        depth_ratio: largest over smallest size of the final residual stream over the depths.
        depth_growth: factor by which that must grow over the depths in the control.
    """

    slope: float = 0.05
    growth: float = 4.0
    depth_ratio: float = 2.5
    depth_growth: float = 10.0


@dataclass(frozen=True)
class Line:
    """One kind of number of one activation or weight at one step, over widths or depths.

    Attributes:
        at: widths or depths, ascending.
        means: over seeds.
        slope: of log(mean) against log(at), least squares; not finite if a value is zero or not finite.
        spread: standard deviation over seeds of each seed's own slope; None with one seed.
    """

    variant: str
    kind: Kind
    name: str
    step: int
    at: list[int]
    means: list[float]
    slope: float
    spread: Optional[float]

    @property
    def growth(self) -> float:
        """The last mean over the first; infinite if only the last is not finite; 1 if nothing is there to grow."""
        first, last = self.means[0], self.means[-1]
        if not math.isfinite(first) or first == last == 0:
            return 1.0
        return last / first if first and math.isfinite(last) else math.inf

    @property
    def ratio(self) -> float:
        """The largest mean over the smallest; infinite if one is zero or not finite."""
        return max(self.means) / min(self.means) if all(0 < mean < math.inf for mean in self.means) else math.inf


def lines(coordinates: Sequence[Coordinate]) -> list[Line]:
    """The slopes of everything measured: by variant and kind, activations as they come in the forward pass, step by step."""
    groups: dict[tuple[str, Kind, str, int], dict[tuple[int, int], float]] = {}
    for c in coordinates:
        groups.setdefault((c.variant, c.kind, c.name, c.step), {})[c.at, c.seed] = c.value
    variants = list(dict.fromkeys(variant for variant, *_ in groups))

    def place(key: tuple[str, Kind, str, int]) -> tuple[int, int, int]:
        variant, kind, name, _ = key
        return variants.index(variant), KINDS.index(kind), ACTIVATIONS.index(name) if name in ACTIVATIONS else 0

    return [_line(*key, groups[key]) for key in sorted(groups, key=place)]


def _line(variant: str, kind: Kind, name: str, step: int, values: dict[tuple[int, int], float]) -> Line:
    at, seeds = sorted({a for a, _ in values}), sorted({s for _, s in values})
    table = np.array([[values[a, s] for s in seeds] for a in at])
    means = table.mean(axis=1)
    each = [_slope(at, table[:, i]) for i in range(len(seeds))]
    spread = float(np.std(each, ddof=1)) if len(seeds) > 1 else None
    return Line(variant, kind, name, step, at, [float(mean) for mean in means], _slope(at, means), spread)


def _slope(at: Sequence[int], values: np.ndarray) -> float:
    if not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan
    return float(np.polyfit(np.log(at), np.log(values), 1)[0])


def judge(found: Sequence[Line], subject: str, control: Optional[str], axis: Axis, limits: Limits) -> list[Verdict]:
    """The verdict on the subject, and on whether the control failed as it must."""
    of = [line for line in found if line.variant == subject]
    against = [line for line in found if line.variant == control]
    said = _judge_width(of, limits) if axis == "width" else _judge_depth(of, limits)
    if control is None:
        return [said, Verdict("WARNING", "no control: nothing shows that this check could fail")]
    return [said, (_control_width if axis == "width" else _control_depth)(against, limits)]


def judged(line: Line) -> bool:
    """Whether a line counts: the sizes of activations always, of products and all changes from the second update on.

    What is zero at any size, as the queries of model.q_init=zero are at the start, neither grows nor falls.
    """
    if line.kind == "update" or (line.kind == "size" and not any(line.means)):
        return False
    return line.step >= (2 if line.kind == "change" or line.name in PRODUCTS else 0)


def _judge_width(of: list[Line], limits: Limits) -> Verdict:
    worst = max((line for line in of if judged(line)), key=lambda line: math.inf if math.isnan(line.slope) else abs(line.slope))
    passes = abs(worst.slope) <= limits.slope
    n = sum(judged(line) for line in of)
    wrong = sum(judged(line) and not abs(line.slope) <= limits.slope for line in of)
    range_ = f"widths {worst.at[0]} to {worst.at[-1]}"
    text = f"{worst.variant}: {'flat' if passes else 'not flat'} over {range_}: "
    text += f"{n} slopes within ±{limits.slope:g}" if passes else f"{wrong} of {n} slopes beyond ±{limits.slope:g}"
    text += f"; the steepest, {_slope_text(worst)}, is the {worst.kind} of {worst.name} after {_updates(worst.step)}"
    return Verdict("PASS" if passes else "FAIL", text)


def _control_width(of: list[Line], limits: Limits) -> Verdict:
    last = max(line.step for line in of)
    most = max((line for line in of if line.kind == "change" and line.step == last), key=lambda line: line.growth)
    grows = most.growth >= limits.growth
    text = f"the control {most.variant} {'grows, as it must' if grows else 'does not grow'}: {most.name} changes "
    text += f"{most.growth:.1f} times as much at width {most.at[-1]} as at {most.at[0]} after {_updates(last)}"
    return Verdict("PASS" if grows else "FAIL", text + f" (at least {limits.growth:g} wanted)")


def _judge_depth(of: list[Line], limits: Limits) -> Verdict:
    worst = max((line for line in of if _is_final(line)), key=lambda line: line.ratio)
    flat = worst.ratio <= limits.depth_ratio
    text = f"{worst.variant}: the final residual stream is {'flat' if flat else 'not flat'} over depths {worst.at[0]} to "
    text += f"{worst.at[-1]}: largest over smallest at most {worst.ratio:.2f}, after {_updates(worst.step)}"
    return Verdict("PASS" if flat else "FAIL", text + f" (at most {limits.depth_ratio:g} allowed)")


def _control_depth(of: list[Line], limits: Limits) -> Verdict:
    last = max((line for line in of if _is_final(line)), key=lambda line: line.step)
    grows = last.growth >= limits.depth_growth
    text = f"the control {last.variant} {'grows, as it must' if grows else 'does not grow'}: the final residual stream is "
    text += f"{last.growth:.1f} times as large at depth {last.at[-1]} as at {last.at[0]} after {_updates(last.step)}"
    return Verdict("PASS" if grows else "FAIL", text + f" (at least {limits.depth_growth:g} wanted)")


def _is_final(line: Line) -> bool:
    return line.kind == "size" and line.name == "final"


def _updates(n: int) -> str:
    return f"{n} update{'s' * (n != 1)}"


def _slope_text(line: Line) -> str:
    return f"{line.slope:+.3f}" + ("" if line.spread is None else f" ± {line.spread:.3f}")


def table(found: Sequence[Line], steps: Sequence[int]) -> list[list[str]]:
    """Slopes with their seed spread: a row for each variant, kind and name, a column for each of these steps."""
    at = {(line.variant, line.kind, line.name, line.step): line for line in found}
    rows = []
    for variant, kind, name in dict.fromkeys((line.variant, line.kind, line.name) for line in found):
        cells = [at.get((variant, kind, name, step)) for step in steps]
        rows.append([variant, kind, name, *("" if cell is None else _slope_text(cell) for cell in cells)])
    return rows
