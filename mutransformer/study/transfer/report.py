"""The transfer report: verdicts, and one Markdown page with verdicts, figures and tables."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mutransformer.errors import check, translate_errors
from mutransformer.mup.checks.transfer import Variant, analyze
from mutransformer.mup.checks.verdict import CheckError, Verdict, count
from mutransformer.mup.checks.width_ordering import WidthOrdering
from mutransformer.study.sweep.records import Run, setting_values

PAGE, RATE_FIGURE, STEP_FIGURE = "report.md", "loss_against_rate", "loss_against_step"
DISTINGUISHES = "this sweep can distinguish a good parametrization from a bad one"

DEFINITIONS = """\
- **Loss**: the validation loss after the last step, in nats per token, mean over seeds; ± in the tables of losses is the
  standard deviation over seeds. A learning rate at which any seed diverged counts as diverged.
- **Optimum**: the vertex of the parabola, in log2(learning rate), through the lowest mean loss of the grid and its two
  neighbors; ± is the standard error over the optima of single seeds. If a neighbor is missing or diverged, or the lowest
  loss is at the edge of the grid, there are only bounds: a neighbor with a higher loss bounds the optimum by the midpoint
  of the two.
- **Drift**: the largest optimum over widths minus the smallest, in octaves (factors of two). It is never negative, so noise
  alone gives a positive value. *Signed*: the widest width's optimum minus the narrowest's. ± is the standard error over
  seeds, the two widths paired by seed.
- **Transfers**: every optimum was found, and the drift is at most {max_drift:g} octaves. *Same best of the grid* is a coarser
  criterion, that of Lingle (arXiv 2404.05728): the best learning rate of the grid is the same at every width.
- **Zero-shot penalty**: a width's loss at the learning rate that is best for the narrowest width, minus the width's own
  lowest loss of the grid: the cost of tuning on the narrowest width.
- **Wider is better**: at every logged step, the training loss of each width minus that of the next narrower one, at the same
  learning rate and seed, mean over seeds, is at most twice its noise. The noise is the standard deviation of that
  difference over seeds, pooled over steps, divided by the square root of the number of seeds. With one seed there is no
  estimate of noise, and the difference must not be above 0.
- **Control**: a parametrization that should not transfer. It does not affect the result, but if it transfers as well,
  nothing shows that the sweep can distinguish a good parametrization from a bad one.
"""


def write(
    runs: Sequence[Run], out: Path, max_drift: float, controls: Sequence[str] = (), rate: float | None = None
) -> list[Verdict]:
    """Writes the page and its figures to a folder, with runs, controls and rate as `analyze` takes them; max_drift is in octaves.

    Equal runs give equal bytes. Raises ConfigError as `analyze` does, and if max_drift is out of range or matplotlib is missing.
    """
    from mutransformer.study import figures  # needs matplotlib, which is an extra

    check(0 <= max_drift < math.inf, f"--max-drift {max_drift}: must be 0 or more, in octaves")
    with translate_errors("", CheckError):
        variants = analyze(runs, controls, rate)
    verdicts = judge(variants, runs, max_drift)
    out.mkdir(parents=True, exist_ok=True)
    figures.save(figures.loss_against_rate, variants, path=out / RATE_FIGURE)
    figures.save(figures.loss_against_step, variants, path=out / STEP_FIGURE)
    (out / PAGE).write_text(page(variants, runs, verdicts, max_drift), encoding="utf-8")
    return verdicts


def judge(variants: Sequence[Variant], runs: Sequence[Run], max_drift: float) -> list[Verdict]:
    """Two verdicts on each variant that `analyze` gives for these runs, the behavior of controls, and warnings."""
    verdicts = []
    for variant in variants:
        name, transfer, better = variant.name, transfers(variant, max_drift), variant.ordering.better
        drift = f"{drift_in_words(variant)} (at most {max_drift:g} allowed)"
        if variant.control:
            words = {True: "transfers, unexpectedly", False: "does not transfer, as expected", None: "may or may not transfer"}
            verdicts.append(Verdict("CONTROL", f"{name} {words[transfer]}: {drift}"))
        else:
            words = {True: "transfers", False: "does not transfer", None: "is not shown to transfer"}
            verdicts.append(Verdict("PASS" if transfer else "FAIL", f"{name}: the learning rate {words[transfer]}: {drift}"))
            verdicts.append(Verdict("PASS" if better else "FAIL", f"{name}: {ordering_in_words(variant.ordering)}"))
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
    optima = {width: fit.optimum for width, fit in variant.fits.items() if not fit.optimum.is_point}
    lost = "; ".join(f"width {width}: {optimum.why}, so {optimum}" for width, optimum in optima.items())
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


def page(variants: Sequence[Variant], runs: Sequence[Run], verdicts: Sequence[Verdict], max_drift: float) -> str:
    """The report as Markdown."""
    parts = [
        "# Does the learning rate transfer over width?",
        "\n".join(f"- **{verdict.outcome}** {_escape(verdict.text)}" for verdict in verdicts),
        f"![Validation loss against learning rate]({RATE_FIGURE}.png)",
        "Validation loss against learning rate, a line for each width. Bands: standard deviation over seeds. Diamonds: optimum ± "
        f"standard error. Losses far above the best are cut off. [SVG]({RATE_FIGURE}.svg)",
        f"![Training loss against step]({STEP_FIGURE}.png)",
        "Training loss of all widths at one learning rate. Below: each width's loss minus that of the next narrower one, in the "
        f"color of the wider; where it is below the dotted line, wider is better. [SVG]({STEP_FIGURE}.svg)",
    ]
    if len(variants) > 2:
        parts += ["## Overview", _overview(variants, max_drift)]
    for variant in variants:
        parts += _section(variant)
    return "\n\n".join([*parts, "## Runs", _settings(runs), "## Definitions", DEFINITIONS.format(max_drift=max_drift)])


def _section(variant: Variant) -> list[str]:
    losses, optima, pairs = [], [], []
    for width, fit in variant.fits.items():
        cells = {rate: f"**{cell}**" if rate == fit.best else cell for rate, cell in fit.cells.items()}
        losses.append([width, *(cells.get(rate, "") for rate in variant.rates)])
        at, best = fit.optimum, "none" if fit.best is None else f"{fit.best:.4g}"
        no_error = at.is_point and at.stderr is None and len(variant.seeds) > 1
        why = "no ±: a single seed has no optimum" if no_error else at.why
        optima.append([width, at, best, _loss(fit.best_loss), _loss(fit.penalty(variant.tuned), 4), why])
    for pair in (pair for pair in variant.ordering.pairs if pair.steps):
        largest = f"{nats(pair.difference[pair.worst])} at step {pair.steps[pair.worst]}"
        holds = f"{int(pair.holds.sum())} of {len(pair.steps)}"
        pairs.append([pair, holds, largest, f"{2 * pair.noise:.4f}", nats(pair.difference[-1]), pair.seeds])
    drift, wider = _escape(drift_in_words(variant)), _escape(ordering_in_words(variant.ordering))
    pairs_head = ["widths", "holds at", "largest difference", "2 × noise", "at the last step", "seeds"]
    return [
        f"## {_escape(variant.title)}",
        "Validation loss by width and log2(learning rate), each width's lowest in bold; "
        f"{count(len(variant.seeds), 'seed')}, {count(variant.diverged, 'run')} diverged:",
        _table(["width", *(f"{rate:.4g}" for rate in variant.rates)], losses),
        _table(["width", "optimum, log2", "best of the grid", "its loss", "zero-shot penalty", ""], optima),
        f"{drift[:1].upper()}{drift[1:]}; signed, from width {variant.widths[0]} to {variant.widths[-1]}: "
        f"{variant.signed_drift}. The best of the grid {'is' if variant.same_best else 'is not'} the same at every width.",
        f"{wider[:1].upper()}{wider[1:]}.",
        *([_table(pairs_head, pairs)] if variant.ordering.pairs else []),
    ]


def _overview(variants: Sequence[Variant], max_drift: float) -> str:
    answers = {True: "yes", False: "**no**", None: "not known"}
    rows = []
    for variant in variants:
        fits, held = list(variant.fits.values()), f"{variant.ordering.held} of {variant.ordering.compared}"
        optima = " / ".join(str(replace(fit.optimum, stderr=None)) for fit in fits)
        losses, penalty = " / ".join(_loss(fit.best_loss) for fit in fits), _loss(fits[-1].penalty(variant.tuned), 4)
        answer = answers[transfers(variant, max_drift)]
        rows.append([_escape(variant.title), answer, variant.drift, optima, losses, penalty, held])
    head = ["variant", "transfers", "drift, octaves", "optimum by width, log2", "lowest loss by width"]
    return _table([*head, "zero-shot penalty at the widest", "wider is better"], rows)


def _settings(runs: Sequence[Run]) -> str:
    values = setting_values(runs)
    differing = [key for key in values if len(values[key]) > 1]
    common = [f"- `{key}` = {_escape(values[key][0])}" for key in values if key not in differing]
    own = []
    for name in dict.fromkeys(run.variant for run in runs):
        of_variant = setting_values([run for run in runs if run.variant == name], differing)
        own.append(f"- {_escape(name)}: " + ", ".join(f"`{key}` = {_escape(' or '.join(v))}" for key, v in of_variant.items()))
    steps = " or ".join(map(str, sorted({run.steps for run in runs})))
    hours = sum(run.seconds for run in runs) / 3600
    head = f"{count(len(runs), 'run')} of {steps} steps, {hours:.2f} hours in total, compilation included. "
    parts = [head + "Settings other than the defaults that all runs share:", "\n".join(common or ["- none"])]
    return "\n\n".join(parts + ["Those that differ:", "\n".join(own)] * bool(differing))


def _loss(loss: float | None, digits: int = 3) -> str:
    return "unknown" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.{digits}f}"


def _escape(text: str) -> str:
    """Text without meaning to Markdown."""
    return re.sub(r"([\\`*_|<\[])", r"\\\1", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])
