"""Verdicts of a coordinate check: whether the checked parametrization is flat, and whether the control grows. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mutransformer.study.coordinates.slopes import SlopeFit
from mutransformer.study.sweep.grid import Axis
from mutransformer.study.verdict import Verdict, count

# Products fall with width at the start, until training has aligned their factors: judged from the second update on.
PRODUCTS = ("logits", "attention_logits")


@dataclass(frozen=True)
class Limits:
    """Bounds of a passing check. Over depth the size of the final residual stream is judged."""

    slope: float = 0.05  # at most: |d log(mean |x|) / d log(width)|
    growth: float = 4.0  # at least: the factor by which, in the control, some activation's change grows over the widths
    depth_ratio: float = 2.5  # at most: largest / smallest over the depths
    depth_growth: float = 10.0  # at least: the factor by which it grows over the depths in the control


def judge(fits: Sequence[SlopeFit], subject: str, control: str | None, axis: Axis, limits: Limits) -> list[Verdict]:
    """The verdict on the checked variant, and on whether the control fails as it should."""
    if axis == "depth":
        fits = [fit for fit in fits if (fit.kind, fit.name) == ("size", "final")]
    subjects, controls = ([fit for fit in fits if fit.variant == variant] for variant in (subject, control))
    flat = (_flat_over_width if axis == "width" else _flat_over_depth)(subjects, limits)
    if control is None:
        return [flat, Verdict("WARNING", "no control: nothing shows that this check can fail")]
    return [flat, _grows(controls, axis, limits)]


def counts(fit: SlopeFit) -> bool:
    """Whether a fit is judged: sizes, of products from the second update on; changes, from the second update on.

    Sizes that are zero at every width, as of queries at the start with model.q_init=zero, are not.
    """
    if fit.kind == "update" or (fit.kind == "size" and not any(fit.means)):
        return False
    return fit.step >= (2 if fit.kind == "change" or fit.name in PRODUCTS else 0)


def _flat_over_width(fits: list[SlopeFit], limits: Limits) -> Verdict:
    judged = [fit for fit in fits if counts(fit)]
    worst = max(judged, key=lambda fit: math.inf if math.isnan(fit.slope) else abs(fit.slope))
    outside, n = sum(not abs(fit.slope) <= limits.slope for fit in judged), len(judged)
    text = f"{worst.variant}: {'not flat' if outside else 'flat'} over widths {worst.at[0]} to {worst.at[-1]}: "
    text += f"{outside} of {n} slopes outside" if outside else f"{n} slopes within"
    text += f" ±{limits.slope:g}; the steepest, {worst}, is the {worst.kind} of {worst.name} after {count(worst.step, 'update')}"
    return Verdict("FAIL" if outside else "PASS", text)


def _flat_over_depth(fits: list[SlopeFit], limits: Limits) -> Verdict:
    worst = max(fits, key=lambda fit: fit.ratio)
    flat = worst.ratio <= limits.depth_ratio
    text = f"{worst.variant}: the final residual stream is {'flat' if flat else 'not flat'} over depths {worst.at[0]} to "
    text += f"{worst.at[-1]}: largest / smallest size at most {worst.ratio:.2f}, after {count(worst.step, 'update')}"
    return Verdict("PASS" if flat else "FAIL", f"{text} (at most {limits.depth_ratio:g} allowed)")


def _grows(fits: list[SlopeFit], axis: Axis, limits: Limits) -> Verdict:
    """On the control, after the last update: over width by the change that grows most, over depth by the final size."""
    last = max(fit.step for fit in fits)
    kind = "size" if axis == "depth" else "change"
    most = max((fit for fit in fits if (fit.kind, fit.step) == (kind, last)), key=lambda fit: fit.growth)
    least = limits.depth_growth if axis == "depth" else limits.growth
    grows, factor = most.growth >= least, f"{most.growth:.1f} times as"
    what = f"the final residual stream is {factor} large" if axis == "depth" else f"{most.name} changes {factor} much"
    text = f"the control {most.variant} {'grows, as it should' if grows else 'does not grow'}: {what} at {axis} {most.at[-1]} as "
    text += f"at {most.at[0]} after {count(last, 'update')} (at least {least:g} required)"
    return Verdict("PASS" if grows else "FAIL", text)
