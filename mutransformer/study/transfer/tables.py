"""The numbers of a transfer report as files: CSV for further analysis, and LaTeX tables in the style of booktabs."""

import csv
import io
import math
import re
from collections.abc import Sequence

from mutransformer.mup.checks.comparison import compare_tuned
from mutransformer.mup.checks.optimum import Bounds
from mutransformer.mup.checks.transfer import Variant
from mutransformer.mup.checks.verdict import count

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def optima_csv(variants: Sequence[Variant]) -> str:
    """A line for each variant and size. Rates are log2, losses nats per token; a field is empty where there is no such number."""
    head = ["variant", "control", variants[0].axis.name, "low", "high", "stderr_seeds", "grid", "vertex_loss", "best_rate"]
    rows = []
    for variant in variants:
        for size, fit in variant.fits.items():
            at = fit.optimum
            numbers = (at.low, at.high, at.stderr, at.grid, at.loss, fit.best, fit.best_loss, fit.penalty(variant.tuned))
            rows.append([variant.name, int(variant.control), size, *map(_number, numbers), len(fit.seeds), at.why])
    return _csv([*head, "best_loss", "zero_shot_penalty", "seeds", "why_no_optimum"], rows)


def losses_csv(variants: Sequence[Variant]) -> str:
    """A line for each variant, size and rate: mean (adjusted, see `mean_losses`) and standard deviation over seeds."""
    rows = []
    for variant in variants:
        for size, fit in variant.fits.items():
            for rate, cell in fit.cells.items():
                numbers = [_number(fit.losses.get(rate)), _number(cell.spread), len(cell.losses), cell.diverged]
                rows.append([variant.name, int(variant.control), size, _number(rate), repr(2.0**rate), *numbers])
    head = ["variant", "control", variants[0].axis.name, "log2_rate", "rate", "loss", "std_seeds", "seeds", "diverged"]
    return _csv(head, rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


def latex(variants: Sequence[Variant]) -> str:
    """A table of losses and optima for each variant, and one of the comparison with the others; needs the package booktabs."""
    parts = [r"% needs \usepackage{booktabs}"]
    axis = variants[0].axis
    for variant in variants:
        rows = []
        for size, fit in variant.fits.items():
            cells = {rate: r"\textbf{" + _loss(x) + "}" if rate == fit.best else _loss(x) for rate, x in fit.losses.items()}
            losses = [cells.get(rate, "") for rate in variant.rates]
            rows.append([str(size), *losses, _optimum(fit.optimum), _loss(fit.penalty(variant.tuned))])
        head = [axis.name, *(f"$2^{{{rate:.4g}}}$" for rate in variant.rates), r"$\log_2$ optimum", "penalty"]
        which = r"the second $\pm$ is" if len(variant.seeds) > 1 else r"$\pm$ is"
        seeds = count(len(variant.seeds), "seed")
        title = f"{_escape(variant.title)}: validation loss by {axis.name} and learning rate, {seeds}; "
        title += f"drift of the optimum {_optimum(variant.drift)} octaves; {which} that of the grid of rates."
        parts.append(_tabular(title, head, rows))
    comparisons = compare_tuned(variants)
    for subject, other in dict.fromkeys((each.subject, each.other) for each in comparisons):
        rows = []
        for each in comparisons:
            if (each.subject, each.other) == (subject, other):
                gain = "" if each.difference is None else f"${each.difference:+.3f}" + _pm(each.stderr, 3) + "$"
                rate = "" if each.other_rate is None else f"$2^{{{each.other_rate:.4g}}}$"
                rows.append([str(each.size), _loss(each.loss), rate, _loss(each.other_loss), gain])
        head = [axis.name, f"{_escape(subject)}", "rate", f"{_escape(other)}, tuned", "difference"]
        parts.append(_tabular(f"{_escape(subject)} at one rate against {_escape(other)} tuned at each {axis.name}.", head, rows))
    return "\n\n".join(parts) + "\n"


def _tabular(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(row) + r" \\" for row in (head, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    columns = "r" * len(head)
    begin = [r"\begin{table}", r"\centering", rf"\caption{{{title}}}", rf"\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*begin, *body, r"\end{tabular}", r"\end{table}"])


def _optimum(at: Bounds) -> str:
    if at.is_point:
        return f"${at.low:.2f}" + _pm(at.stderr, 2) + _pm(at.grid, 2) + "$"
    if math.isinf(at.low):
        return "unknown" if math.isinf(at.high) else rf"$\le {at.high:.2f}$"
    return rf"$\ge {at.low:.2f}$" if math.isinf(at.high) else f"${at.low:.2f}$ to ${at.high:.2f}$"


def _pm(error: float | None, digits: int) -> str:
    return "" if error is None else rf" \pm {error:.{digits}f}"


def _loss(loss: float | None) -> str:
    return "" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.3f}"


def _escape(text: str) -> str:
    """Text without meaning to LaTeX."""
    return re.sub(r"[\\~^&%$#_{}]", lambda found: SPECIAL.get(found[0], "\\" + found[0]), text)
