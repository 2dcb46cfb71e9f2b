"""The transfer report as one Markdown page: verdicts, figures, tables and definitions."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from mutransformer.mup.checks.comparison import TunedComparison, compare_tuned
from mutransformer.mup.checks.optimum import LEAST
from mutransformer.mup.checks.runs import Run, setting_values, short
from mutransformer.mup.checks.transfer import Variant
from mutransformer.mup.checks.transfer_verdicts import MIN_RATES, drift_in_words, nats, ordering_in_words, transfers
from mutransformer.mup.checks.verdict import Verdict, count
from mutransformer.mup.checks.width_ordering import CHANCE, INDEPENDENT

TRANSFER_FIGURE, RATE_FIGURE, STEP_FIGURE = "transfer", "loss_against_rate", "loss_against_step"

DEFINITIONS = """\
- **Loss**: the validation loss after the last step, in nats per token, mean over seeds; ± in the tables of losses is the
  standard deviation over seeds. A learning rate at which any seed diverged counts as diverged. Where some rates of a {axis} lack
  seeds, optima and differences use means of the model loss = f(rate) + g(seed), fitted to the runs there are, so that a rate
  is not compared with its neighbors over other seeds.
- **Optimum**: the vertex of the parabola, in log2(learning rate), through the lowest mean loss of the grid and its two
  neighbors; each {axis} has its own grid. If a neighbor is missing or diverged, there are only bounds: a neighbor with a higher
  loss bounds the optimum by the midpoint of the two.
- **± seeds**: the standard error over the optima of single seeds; of a drift, the seeds of the two sizes paired.
- **± grid**: what the spacing of the rates leaves open. Curves of loss are skewed, and a parabola through three points of a
  skewed curve has its vertex beside the minimum. The curve is therefore fitted in up to four other ways that use a second
  neighbor on either side: the cubic through the four points, and the parabola through the three points of that side. ± grid is
  the root mean square of their distances from the vertex; half the wider spacing if there is no second neighbor. Of a drift it
  is the same for the difference of two optima, each way used at both sizes alike: what is wrong in the same way at
  both cancels, down to {least:g} of the spacing for each.
- **Drift**: the largest optimum over sizes minus the smallest, in octaves (factors of two). It is never negative, so noise
  alone gives a positive value. *Signed*: the largest size's optimum minus the smallest's.
- **Transfers**: every optimum was found from at least {min_rates} rates, and the drift plus twice its uncertainty (seeds
  and grid, added in squares) is at most {max_drift:g} octaves. *Does not transfer*: the drift minus twice its uncertainty is
  more than that. Otherwise the runs do not determine it: UNKNOWN, which does not pass. *Same best of the grid* is a coarser
  criterion, that of Lingle (arXiv 2404.05728): the best learning rate of the grid is the same at every size.
- **Zero-shot penalty**: a size's loss at the learning rate that is best for the smallest size, minus the size's own lowest
  loss of the grid: the cost of tuning on the smallest size.
- **Control**: a parametrization that should not transfer. It does not affect the result, but if it transfers as well,
  nothing shows that the sweep can distinguish a good parametrization from a bad one.
"""
WIDER = """\
- **Wider is better**: at every logged step, the training loss of each width minus that of the next narrower one, at the same
  learning rate and seed, mean over seeds, is at most twice its noise. The noise is the standard deviation of that
  difference over seeds, of the step and its two neighbors together, divided by the square root of the number of seeds: it is
  largest where the loss falls fast, as the warm-up ends. With one seed there is no estimate of noise, and the difference must
  not be above 0. *Wider is not always better*: it diverged, or a difference is more than chance explains: the noise times
  Student's quantile at {chance:g} / (number of comparisons), with {independent} (seeds - 1) degrees of freedom. Between the two
  bounds the runs do not determine it: UNKNOWN, and more seeds decide. Among dozens of comparisons, one beyond twice the noise
  is common by chance.
"""
FOLLOWS = """\
- **Exponent**: the slope p of log2(optimum) against log2({axis}), by least squares. ± seeds is the larger of two standard
  errors: over the slopes of single seeds, and of the straight line. A published exponent is consistent with it within twice the
  uncertainty. It is that of the base learning rate: with a rule that already follows {axis}, what the rule leaves over.
"""


def page(variants: Sequence[Variant], runs: Sequence[Run], verdicts: Sequence[Verdict], max_drift: float) -> str:
    """The report as Markdown."""
    axis = variants[0].axis
    definitions = DEFINITIONS + (WIDER if axis.wider_is_better else "") + (FOLLOWS if axis.name in ("tokens", "batch") else "")
    parts = [
        f"# Does the learning rate transfer over {axis.name}?",
        "\n".join(f"- **{verdict.outcome}** {_escape(verdict.text)}" for verdict in verdicts),
        f"![Validation loss against learning rate]({RATE_FIGURE}.png)",
        f"Validation loss against learning rate, a line for each {axis.name}. Bands: standard deviation over seeds. Diamonds: "
        "optimum ± its uncertainty, seeds and grid together. Losses far above the best are cut off. "
        f"[SVG]({RATE_FIGURE}.svg); the first variant in one panel: [PNG]({TRANSFER_FIGURE}.png), [SVG]({TRANSFER_FIGURE}.svg). "
        "Numbers: [optima](optima.csv), [losses](losses.csv), [LaTeX](tables.tex).",
    ]
    if axis.wider_is_better:
        parts += [
            f"![Training loss against step]({STEP_FIGURE}.png)",
            "Training loss of all widths at one learning rate. Below: each width's loss minus that of the next narrower one, in "
            f"the color of the wider; where it is below the dotted line, wider is better. [SVG]({STEP_FIGURE}.svg)",
        ]
    if len(variants) > 2:
        parts += ["## Overview", _overview(variants, max_drift)]
    if comparisons := compare_tuned(variants):
        parts += _comparison(comparisons, variants)
    for variant in variants:
        parts += _section(variant)
    bounds = {"max_drift": max_drift, "min_rates": MIN_RATES, "least": LEAST, "chance": CHANCE, "independent": INDEPENDENT}
    filled = definitions.format(axis=axis.name, **bounds)
    return "\n\n".join([*parts, "## Runs", _settings(runs, axis.settings), "## Definitions", filled])


def _section(variant: Variant) -> list[str]:
    losses, optima, name = [], [], variant.axis.name
    for size, fit in variant.fits.items():
        cells = {rate: f"**{cell}**" if rate == fit.best else cell for rate, cell in fit.cells.items()}
        losses.append([short(size), *(cells.get(rate, "") for rate in variant.rates)])
        at, best = fit.optimum, "none" if fit.best is None else f"{fit.best:.4g}"
        no_error = at.is_point and at.stderr is None and len(fit.seeds) > 1
        why = "no ± seeds: a single seed has no optimum" if no_error else at.why
        place, penalty = replace(at, stderr=None, grid=None), _loss(fit.penalty(variant.tuned), 4)
        optima.append([short(size), place, _error(at.stderr), _error(at.grid), best, _loss(fit.best_loss), penalty, why])
    drift = _escape(drift_in_words(variant))
    seeds = sorted({len(fit.seeds) for fit in variant.fits.values()})
    counted = count(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    optima_head = [name, "optimum, log2", "± seeds", "± grid", "best of the grid", "its loss", "zero-shot penalty", ""]
    parts = [
        f"## {_escape(variant.title)}",
        f"Validation loss by {name} and log2(learning rate), each one's lowest in bold; "
        f"{counted}, {count(variant.diverged, 'run')} diverged:",
        _table([name, *(f"{rate:.4g}" for rate in variant.rates)], losses),
        _table(optima_head, optima),
        f"{drift[:1].upper()}{drift[1:]}; signed, from {variant.axis.label(variant.sizes[0])} to "
        f"{variant.axis.label(variant.sizes[-1])}: {variant.signed_drift}. "
        f"The best of the grid {'is' if variant.same_best else 'is not'} the same at every {name}.",
    ]
    ordering, pairs = variant.ordering, []
    if ordering is None:
        return [*parts, f"Whether a larger model is better at every step is not judged over {name}."]
    for pair in (pair for pair in ordering.pairs if pair.steps):
        closest = f"{nats(pair.difference[pair.worst])} at step {pair.steps[pair.worst]}"
        holds = f"{int(pair.holds.sum())} of {len(pair.steps)}"
        pairs.append([pair, holds, closest, f"{2 * pair.noise[pair.worst]:.4f}", nats(pair.difference[-1]), pair.seeds])
    wider = _escape(ordering_in_words(ordering))
    head = ["widths", "holds at", "closest to failing", "2 × noise there", "at the last step", "seeds"]
    return [*parts, f"{wider[:1].upper()}{wider[1:]}.", *([_table(head, pairs)] if ordering.pairs else [])]


def _comparison(comparisons: Sequence[TunedComparison], variants: Sequence[Variant]) -> list[str]:
    """Tables of each subject at one rate against another variant tuned at each size."""
    name, smallest = variants[0].axis.name, variants[0].sizes[0]
    parts = [
        "## Tuned once against tuned at every size",
        f"The loss of a variant at one learning rate, the best of its smallest {name}, against that of another whose rate is "
        f"tuned anew at each {name}: the lowest mean of its grid, which favors it a little. Differences are over the seeds that "
        "both have, ± the standard error paired by seed; below zero, tuning once is the better. Vertex: the other's loss at the "
        "vertex of its parabola.",
    ]
    for subject, other in dict.fromkeys((each.subject, each.other) for each in comparisons):
        rows, of = [], [each for each in comparisons if (each.subject, each.other) == (subject, other)]
        for each in of:
            theirs = "none" if each.other_rate is None else f"2^{each.other_rate:.4g}"
            gain = "unknown" if each.difference is None else _difference(each.difference, each.stderr)
            ours = "no run" if each.loss is None else _loss(each.loss)
            vertex = "none" if each.vertex is None else _loss(each.vertex)
            rows.append([short(each.size), ours, theirs, _loss(each.other_loss), gain, each.seeds, vertex])
        subject, other = _escape(subject), _escape(other)
        ours = f"{subject} at 2^{of[0].rate:.4g}"
        head = [name, ours, f"{other}: best rate", "its loss", f"{subject} minus {other}", "seeds", f"{other} at its vertex"]
        parts += [_table(head, rows), _summary(of, f"{ours}, tuned at {variants[0].axis.label(smallest)} only,", other, name)]
    return parts


def _summary(comparisons: Sequence[TunedComparison], ours: str, other: str, name: str) -> str:
    """At how many sizes the difference is beyond twice its standard error."""
    known = [
        (each.difference, 2 * each.stderr) for each in comparisons if each.difference is not None and each.stderr is not None
    ]
    if not known:
        return "No difference has a standard error: that needs two seeds that both have."
    better, worse = sum(gain < -margin for gain, margin in known), sum(gain > margin for gain, margin in known)
    counted = f"of {len(known)} {'size' if len(known) == 1 else 'sizes'}, beyond twice the standard error"
    return f"{ours} is better than {other} tuned at each {name} at {better} and worse at {worse} {counted}."


def _difference(difference: float, stderr: float | None) -> str:
    if math.isinf(difference) or math.isnan(difference):
        return "diverged"
    return f"{difference:+.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _overview(variants: Sequence[Variant], max_drift: float) -> str:
    answers = {True: "yes", False: "**no**", None: "not known"}
    rows, axis = [], variants[0].axis
    for variant in variants:
        fits = list(variant.fits.values())
        optima = " / ".join(str(replace(fit.optimum, stderr=None, grid=None)) for fit in fits)
        losses, penalty = " / ".join(_loss(fit.best_loss) for fit in fits), _loss(fits[-1].penalty(variant.tuned), 4)
        answer, ordering = answers[transfers(variant, max_drift)], variant.ordering
        held = "not judged" if ordering is None else f"{ordering.held} of {ordering.compared}"
        rows.append([_escape(variant.title), answer, variant.drift, optima, losses, penalty, held])
    head = ["variant", "transfers", "drift, octaves", f"optimum by {axis.name}, log2", f"lowest loss by {axis.name}"]
    return _table([*head, "zero-shot penalty at the largest", "wider is better"], rows)


def _settings(runs: Sequence[Run], varied: frozenset[str]) -> str:
    values = {key: found for key, found in setting_values(runs).items() if key not in varied}
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
    if differing:
        parts += ["Those that differ:", "\n".join(own)]
    return "\n\n".join(parts)


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.2f}"


def _loss(loss: float | None, digits: int = 3) -> str:
    return "unknown" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.{digits}f}"


def _escape(text: str) -> str:
    """Text without meaning to Markdown."""
    return re.sub(r"([\\`*_|<\[])", r"\\\1", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])
