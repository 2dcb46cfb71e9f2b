"""A sweep's numbers as verdicts in words: what passes, what fails, and what weakens both. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np

from mutransformer.study.sweep.records import Run
from mutransformer.study.transfer.fit import Variant
from mutransformer.study.transfer.width_ordering import Order

VARIED = {"model.d_model", "optim.lr", "seed", "name", "workdir"}  # settings that a sweep varies, or that say where it lies


@dataclass(frozen=True)
class Verdict:
    """A line of the report. Only PASS and FAIL judge."""

    outcome: Literal["PASS", "FAIL", "CONTROL", "WARNING"]
    text: str

    def __str__(self) -> str:
        return f"{self.outcome:<7} {self.text}"


def judge(variants: Sequence[Variant], runs: Sequence[Run], max_drift: float) -> list[Verdict]:
    """Two verdicts on each variant, what the controls did, and warnings.

    Args:
        variants: of these runs.
        max_drift: octaves.
    """
    lines = []
    for variant in variants:
        does = transfers(variant, max_drift)
        moved = f"{drift_in_words(variant)} (at most {max_drift:g} allowed)"
        if variant.control:
            said = {
                True: "transfers, and should not",
                False: "does not transfer, as it should not",
                None: "may or may not transfer",
            }
            lines.append(Verdict("CONTROL", f"{variant.name} {said[does]}: {moved}"))
        else:
            said = {True: "transfers", False: "does not transfer", None: "is not shown to transfer"}
            lines.append(Verdict("PASS" if does else "FAIL", f"{variant.name}: the learning rate {said[does]}: {moved}"))
            lines.append(Verdict("PASS" if variant.order.better else "FAIL", f"{variant.name}: {order_in_words(variant.order)}"))
    return lines + _warnings(variants, runs, max_drift)


def transfers(variant: Variant, max_drift: float) -> Optional[bool]:
    """Whether the optima of all widths lie within max_drift octaves; None if not all are found, and bounds do not decide it."""
    if variant.drift.octaves > max_drift:
        return False
    return True if variant.drift.found else None


def _warnings(variants: Sequence[Variant], runs: Sequence[Run], max_drift: float) -> list[Verdict]:
    texts = []
    for variant in variants:
        if variant.control and transfers(variant, max_drift):
            texts.append(
                f"the control {variant.name} transfers as well: this sweep cannot tell a good parametrization from a bad one"
            )
        if variant.missing:
            texts.append(
                f"{variant.name}: {count(variant.missing, 'run')} of the grid missing; means are over the seeds there are"
            )
        if variant.off_grid:
            texts.append(
                f"{variant.name}: {count(variant.off_grid, 'run')} of seeds at one or two learning rates only: used where widths "
                "are compared step by step, and nowhere else"
            )
        if len(variant.seeds) == 1:
            texts.append(f"{variant.name}: one seed: no uncertainty, and no noise to allow for")
        of = [run for run in runs if run.variant == variant.name]
        differing = [key for key in setting_keys(of) if len(setting_values(of, key)) > 1]
        if differing:
            texts.append(f"{variant.name}: its runs differ in more than width, learning rate and seed: {', '.join(differing)}")
    if not any(variant.control for variant in variants):
        texts.append("no control: nothing shows that this sweep could tell a good parametrization from a bad one")
    return [Verdict("WARNING", text) for text in texts]


def setting_keys(runs: Iterable[Run]) -> list[str]:
    """The settings, beside those that a sweep varies, that are not at their default in every run."""
    return sorted({key for run in runs for key in run.settings} - VARIED)


def setting_values(runs: Iterable[Run], key: str) -> list[str]:
    """The different values of a setting, in words."""
    return list(dict.fromkeys(str(run.settings.get(key, "default")) for run in runs))


def drift_in_words(variant: Variant) -> str:
    """With its uncertainty, or the lower bound and what keeps it from being known."""
    drift, ends = variant.drift, f"over widths {variant.widths[0]} to {variant.widths[-1]}"
    if drift.found:
        return f"the optimum drifts {between(drift.octaves, drift.octaves, drift.stderr)} octaves {ends}"
    lost = [
        f"width {width}: {optimum.why}, so {between(optimum.low, optimum.high)}"
        for width, optimum in variant.optima.items()
        if not optimum.found
    ]
    least = f"drifts at least {drift.octaves:.2f} octaves" if drift.octaves else "may drift"
    return f"the optimum {least} {ends}; not found at {'; '.join(lost)}"


def order_in_words(order: Order) -> str:
    """Whether wider is better, in how many comparisons, and the worst of them."""
    if order.rate is None:
        return f"wider is better: cannot tell: {order.why}"
    said = f"wider is {'' if order.better else 'not always '}better at learning rate 2^{order.rate:.4g}"
    parts = [f"{said}: in {order.held} of {order.compared} comparisons"]
    told = [pair for pair in order.pairs if pair.steps]
    if told:
        pair = max(told, key=lambda pair: float(pair.difference.max()) - 2 * pair.noise)
        worst = int(np.argmax(pair.difference))
        allowed = f"noise allows {nats(2 * pair.noise)}" if pair.seeds > 1 else "one seed allows none above 0"
        where = f"at step {pair.steps[worst]}, width {pair.wide} less {pair.narrow}"
        parts.append(f"{'closest' if order.better else 'worst'} {where}: {nats(pair.difference[worst])} ({allowed})")
    return "; ".join(parts + [order.why] * bool(order.why))


def between(low: float, high: float, stderr: Optional[float] = None) -> str:
    """A value, with its standard error, or the bounds that are known."""
    if low == high:
        return f"{low:.2f}" + ("" if stderr is None else f" ± {stderr:.2f}")
    if math.isinf(low) and math.isinf(high):
        return "unknown"
    if math.isinf(low) or math.isinf(high):
        return f"≤ {high:.2f}" if math.isinf(low) else f"≥ {low:.2f}"
    return f"{low:.2f} to {high:.2f}"


def nats(difference: float) -> str:
    """A difference of two training losses, the wider's less the narrower's."""
    if math.isinf(difference):
        return "wider diverged" if difference > 0 else "narrower diverged"
    return f"{difference:+.4f} nats"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)
