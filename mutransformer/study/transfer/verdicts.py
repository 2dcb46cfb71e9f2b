"""Verdicts of a transfer report, and its numbers in words. Pure."""

import math
from collections.abc import Sequence

from mutransformer.study.sweep.records import Run, setting_values
from mutransformer.study.transfer.analysis import Variant
from mutransformer.study.transfer.width_ordering import WidthOrdering
from mutransformer.study.verdict import Verdict, count

DISTINGUISHES = "this sweep can distinguish a good parametrization from a bad one"


def judge(variants: Sequence[Variant], runs: Sequence[Run], max_drift: float) -> list[Verdict]:
    """Two verdicts on each variant that `analyze` gives for these runs, the behavior of controls, and warnings."""
    verdicts = []
    for variant in variants:
        transfer = transfers(variant, max_drift)
        drift = f"{drift_in_words(variant)} (at most {max_drift:g} allowed)"
        if variant.control:
            words = {True: "transfers, unexpectedly", False: "does not transfer, as expected", None: "may or may not transfer"}
            verdicts.append(Verdict("CONTROL", f"{variant.name} {words[transfer]}: {drift}"))
        else:
            words = {True: "transfers", False: "does not transfer", None: "is not shown to transfer"}
            ordering = ordering_in_words(variant.ordering)
            verdicts += [
                Verdict("PASS" if transfer else "FAIL", f"{variant.name}: the learning rate {words[transfer]}: {drift}"),
                Verdict("PASS" if variant.ordering.better else "FAIL", f"{variant.name}: {ordering}"),
            ]
    for variant in variants:
        verdicts += [Verdict("WARNING", text) for text in _warnings(variant, runs, max_drift)]
    if not any(variant.control for variant in variants):
        verdicts.append(Verdict("WARNING", f"no control: nothing shows that {DISTINGUISHES}"))
    return verdicts


def transfers(variant: Variant, max_drift: float) -> bool | None:
    """Whether the optima of all widths lie within max_drift octaves; None if some are not found and the bounds allow both."""
    return False if variant.drift.low > max_drift else True if variant.drift.is_point else None


def _warnings(variant: Variant, runs: Sequence[Run], max_drift: float) -> list[str]:
    """What weakens the verdicts on a variant."""
    name, useless = variant.name, variant.control and transfers(variant, max_drift)
    values = setting_values([run for run in runs if run.variant == name])
    differing = ", ".join(key for key in values if len(values[key]) > 1)
    few = "with seeds that were run at one or two learning rates only: used only where widths are compared step by step"
    texts = {
        f"the control {name} transfers as well: nothing shows that {DISTINGUISHES}": useless,
        f"{name}: {count(variant.missing, 'run')} of the grid missing; means are over the seeds that were run": variant.missing,
        f"{name}: {count(variant.off_grid, 'run')} {few}": variant.off_grid,
        f"{name}: one seed: no uncertainties, and no allowance for noise": len(variant.seeds) == 1,
        f"{name}: its runs differ in more than width, learning rate and seed: {differing}": differing,
    }
    return [text for text, applies in texts.items() if applies]


def drift_in_words(variant: Variant) -> str:
    """The drift with its standard error, or its lower bound and the widths without an optimum."""
    drift, ends = variant.drift, f"over widths {variant.widths[0]} to {variant.widths[-1]}"
    if drift.is_point:
        return f"the optimum drifts {drift} octaves {ends}"
    optima = {width: fit.optimum for width, fit in variant.fits.items() if not fit.optimum.at.is_point}
    lost = "; ".join(f"width {width}: {optimum.why}, so {optimum.at}" for width, optimum in optima.items())
    least = f"drifts at least {drift.low:.2f} octaves" if drift.low else "may drift"
    return f"the optimum {least} {ends}; not found at {lost}"


def ordering_in_words(ordering: WidthOrdering) -> str:
    """Whether wider is better, in how many comparisons, and the one in which the wider is worst relative to the noise."""
    if ordering.rate is None:
        return f"wider is better: undetermined: {ordering.why}"
    words = f"wider is {'' if ordering.better else 'not always '}better at learning rate 2^{ordering.rate:.4g}"
    parts = [f"{words}: in {ordering.held} of {ordering.compared} comparisons"]
    if compared := [pair for pair in ordering.pairs if pair.steps]:
        pair = max(compared, key=lambda pair: float(pair.difference.max()) - 2 * pair.noise)
        allowed = f"noise allows {nats(2 * pair.noise)}" if pair.seeds > 1 else "one seed allows none above 0"
        where = f"{'closest' if ordering.better else 'worst'} at step {pair.steps[pair.worst]}, width {pair}"
        parts.append(f"{where}: {nats(pair.difference[pair.worst])} ({allowed})")
    return "; ".join(parts + [ordering.why] * bool(ordering.why))


def nats(difference: float) -> str:
    """A difference of two training losses, the wider's minus the narrower's."""
    if math.isinf(difference):
        return "wider diverged" if difference > 0 else "narrower diverged"
    return f"{difference:+.4f} nats"
