"""The verdicts on what `analyze` found: whether the learning rate transfers, and whether wider is better. Pure."""

import math
from collections.abc import Mapping, Sequence

from mutransformer.mup.checks.exponent import exponent_in_words
from mutransformer.mup.checks.runs import Run, setting_values
from mutransformer.mup.checks.transfer import Gap, Variant
from mutransformer.mup.checks.verdict import Verdict, count
from mutransformer.mup.checks.width_ordering import WidthOrdering

DISTINGUISHES = "this sweep can distinguish a good parametrization from a bad one"
UNKNOWN = "undetermined whether the learning rate transfers"
MIN_RATES = 4  # at each size, for a drift that is small to count: three always have a parabola, and nothing tests it
LISTED = 6  # missing runs that a warning names


def judge(
    variants: Sequence[Variant], runs: Sequence[Run], max_drift: float, doubts: Mapping[str, Sequence[str]] | None = None
) -> list[Verdict]:
    """Verdicts on each variant that `analyze` gives for these runs, the behavior of controls, and warnings.

    On transfer, and over widths on whether wider is better. max_drift is in octaves. `doubts` are, by variant, reasons why its
    runs determine nothing: its verdicts are then UNKNOWN.
    """
    verdicts, against = [], doubts or {}
    for variant in variants:
        name, told = variant.name, list(against.get(variant.name, ()))
        answer, reasons = (None, told) if told else answer_with_reasons(variant, max_drift)
        words = [f"{drift_in_words(variant)} (at most {max_drift:g} allowed)", *reasons, exponent_in_words(variant)]
        text = "; ".join(filter(None, words))
        if variant.control:
            known = {
                True: "transfers, unexpectedly",
                False: "does not transfer, as expected",
                None: "is undetermined",
            }
            verdicts.append(Verdict("CONTROL", f"{name} {known[answer]}: {text}"))
            continue
        known = {True: "the learning rate transfers", False: "the learning rate does not transfer", None: UNKNOWN}
        verdicts.append(_verdict(answer, f"{name}: {known[answer]}: {text}"))
        if variant.ordering is not None:
            better = None if told else variant.ordering.better
            verdicts.append(_verdict(better, "; ".join([f"{name}: {ordering_in_words(variant.ordering)}", *told])))
    for variant in variants:
        verdicts += [Verdict("WARNING", text) for text in _warnings(variant, runs, max_drift)]
    if not any(variant.control for variant in variants):
        verdicts.append(Verdict("WARNING", f"no control: nothing shows that {DISTINGUISHES}"))
    return verdicts


def _verdict(answer: bool | None, text: str) -> Verdict:
    return Verdict("UNKNOWN" if answer is None else "PASS" if answer else "FAIL", text)


def transfers(variant: Variant, max_drift: float) -> bool | None:
    """Whether the optima of all sizes lie within max_drift octaves; None if the runs do not determine it.

    True only if the drift plus twice its uncertainty is at most max_drift and every size has enough rates; False only if the
    drift minus twice its uncertainty is more.
    """
    return answer_with_reasons(variant, max_drift)[0]


def answer_with_reasons(variant: Variant, max_drift: float) -> tuple[bool | None, list[str]]:
    """As `transfers`, and what keeps it from an answer."""
    drift, margin = variant.drift, 2 * variant.drift.uncertainty
    if drift.low - margin > max_drift:
        return False, []
    few = {size: len(fit.cells) for size, fit in variant.fits.items() if len(fit.cells) < MIN_RATES}
    reasons = [
        f"only {count(n, 'learning rate')} at {variant.axis.label(size)}, {MIN_RATES} are needed" for size, n in few.items()
    ]
    if drift.is_point and drift.low + margin > max_drift:
        grid, noise = drift.grid or 0.0, drift.stderr or 0.0
        remedy = "the grid is too coarse: add half-octave rates around the optima" if grid > noise else "too noisy: add seeds"
        reasons.append(f"twice its uncertainty, ± {margin:.2f}, reaches beyond that; {remedy}")
    return (None if reasons or not drift.is_point else True), reasons


def _warnings(variant: Variant, runs: Sequence[Run], max_drift: float) -> list[str]:
    """What weakens the verdicts on a variant."""
    name, axis, useless = variant.name, variant.axis, variant.control and transfers(variant, max_drift)
    values = setting_values([run for run in runs if run.variant == name])
    differing = ", ".join(key for key in values if len(values[key]) > 1 and key not in axis.settings)
    few = "with seeds that were run at one or two learning rates only: used only where widths are compared step by step"
    unknown_noise = variant.drift.is_point and variant.drift.stderr is None
    texts = {
        f"the control {name} transfers as well: nothing shows that {DISTINGUISHES}": useless,
        f"{name}: {gaps_in_words(variant)}": variant.missing,
        f"{name}: {count(variant.off_grid, 'run')} {few}": variant.off_grid,
        f"{name}: one seed: no uncertainties, and no allowance for noise": len(variant.seeds) == 1,
        f"{name}: no standard error of the drift: a seed has no optimum of its own": unknown_noise and len(variant.seeds) > 1,
        f"{name}: its runs differ in more than {axis.name}, learning rate and seed: {differing}": differing,
    }
    return [text for text, applies in texts.items() if applies]


def gaps_in_words(variant: Variant) -> str:
    """How many runs of the grid are missing, and which."""
    n = sum(len(gap.seeds) for gap in variant.missing)
    named = [_gap(variant, gap) for gap in variant.missing[:LISTED]]
    if len(variant.missing) > LISTED:
        named.append(f"and more at {count(len(variant.missing) - LISTED, 'other rate')}")
    return f"{count(n, 'run')} of the grid missing: {'; '.join(named)}"


def _gap(variant: Variant, gap: Gap) -> str:
    every = gap.seeds == variant.fits[gap.size].seeds
    noun = "seeds" if len(gap.seeds) > 1 else "seed"
    seeds = "all seeds" if every else f"{noun} {', '.join(map(str, gap.seeds))}"
    return f"{variant.axis.label(gap.size)} at 2^{gap.rate:.4g} ({seeds})"


def drift_in_words(variant: Variant) -> str:
    """The drift with its uncertainties, or its lower bound and the sizes without an optimum."""
    drift, ends = variant.drift, f"over {variant.axis.span(variant.sizes)}"
    if drift.is_point:
        return f"the optimum drifts {drift} octaves {ends}"
    optima = {size: fit.optimum for size, fit in variant.fits.items() if not fit.optimum.is_point}
    lost = "; ".join(f"{variant.axis.label(size)}: {optimum.why}, so {optimum}" for size, optimum in optima.items())
    least = f"drifts at least {drift.low:.2f} octaves" if drift.low else "may drift"
    return f"the optimum {least} {ends}; not found at {lost}"


def ordering_in_words(ordering: WidthOrdering) -> str:
    """Whether wider is better, in how many comparisons, and the one in which the wider is worst relative to the noise."""
    if ordering.rate is None:
        return f"undetermined whether wider is better: {ordering.why}"
    known = {True: "wider is better", False: "wider is not always better", None: "undetermined whether wider is better"}
    words = f"{known[ordering.better]} at learning rate 2^{ordering.rate:.4g}"
    parts = [f"{words}: in {ordering.held} of {ordering.compared} comparisons"]
    if compared := [pair for pair in ordering.pairs if pair.steps]:
        pair = max(compared, key=lambda pair: float((pair.difference - 2 * pair.noise).max()))
        allowed = f"noise allows {nats(2 * pair.noise[pair.worst])}" if pair.seeds > 1 else "one seed allows none above 0"
        if ordering.better is None and ordering.held < ordering.compared:
            chance = pair.beyond_chance(ordering.compared)[pair.worst]
            allowed += f", chance explains up to {nats(chance)}: add seeds" if pair.seeds > 1 else ": add seeds"
        where = f"{'worst' if ordering.held < ordering.compared else 'closest'} at step {pair.steps[pair.worst]}, width {pair}"
        parts.append(f"{where}: {nats(pair.difference[pair.worst])} ({allowed})")
    return "; ".join([*parts, ordering.why] if ordering.why else parts)


def nats(difference: float) -> str:
    """A difference of two training losses, the wider's minus the narrower's."""
    if math.isinf(difference):
        return "wider diverged" if difference > 0 else "narrower diverged"
    return f"{difference:+.4f} nats"
