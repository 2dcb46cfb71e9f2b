"""The transfer report: one Markdown page with verdicts on top, figures and tables."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np

from mutransformer.errors import check
from mutransformer.study.sweep.records import Run
from mutransformer.study.transfer.fit import Cell, Variant, analyse
from mutransformer.study.transfer.width_ordering import Order
from mutransformer.study.verdicts import (
    Verdict,
    between,
    count,
    drift_in_words,
    judge,
    nats,
    order_in_words,
    setting_keys,
    setting_values,
    transfers,
)

PAGE, RATE_FIGURE, STEP_FIGURE = "report.md", "loss_against_rate", "loss_against_step"

WORDS = """\
- **Loss** is the validation loss at the end, nats a token, the mean over seeds; ± in the tables of losses is the standard
  deviation over seeds. A learning rate at which any seed diverged counts as diverged.
- **Optimum**: the vertex of the parabola, in log2(learning rate), through the lowest mean loss of the grid and its two
  neighbours; ± is the standard error over seeds, each fitted on its own. If a neighbour is missing or diverged, or the
  lowest loss lies at the edge of the grid, there are only bounds: a neighbour that is worse bounds the optimum by the
  middle between the two.
- **Drift**: the largest optimum over widths less the smallest, in octaves (factors of two); never negative, so noise alone
  makes some. *Signed*: the widest width's optimum less the smallest width's. ± is the standard error over seeds, the two
  widths paired by seed.
- **Transfers**: every optimum was found, and the drift is at most {max_drift:g} octaves. *Same best of the grid* is a
  coarser rule, that of Lingle's study (arXiv 2404.05728): the best learning rate of the grid is the same at every width.
- **Zero-shot penalty**: a width's loss at the learning rate of the grid that is best for the smallest width, less its own
  best loss of the grid: what tuning on the smallest width costs.
- **Wider is better**: at every logged step the training loss of each width, less that of the next narrower one at the same
  learning rate and seed, mean over seeds, is at most twice its noise: the standard deviation of that difference over seeds,
  pooled over steps, divided by the root of the number of seeds. With one seed there is no noise to allow for: it must not
  be above 0.
- **Control**: a parametrization that should not transfer. It decides nothing, but if it transfers as well, the sweep could
  not tell a good parametrization from a bad one.
"""


def write(
    runs: Sequence[Run], out: Path, max_drift: float, controls: Sequence[str] = (), rate: Optional[float] = None
) -> list[Verdict]:
    """Writes the page and its figures; the same runs give the same bytes.

    Args:
        runs: of one or more variants; no two with the same key.
        out: the folder to write to; made if it is not there.
        max_drift: octaves that an optimum may move.
        controls, rate: as analyse takes them.

    Raises:
        ConfigError: as analyse raises it; max_drift is out of range; matplotlib is not installed.
    """
    from mutransformer.study.transfer import plots  # needs matplotlib, which is an extra

    check(0 <= max_drift < math.inf, f"--max-drift {max_drift}: must be 0 or more, in octaves")
    variants = analyse(runs, controls, rate)
    lines = judge(variants, runs, max_drift)
    out.mkdir(parents=True, exist_ok=True)
    plots.save(plots.loss_against_rate, variants, path=out / RATE_FIGURE)
    plots.save(plots.loss_against_step, variants, path=out / STEP_FIGURE)
    (out / PAGE).write_text(page(variants, runs, lines, max_drift), encoding="utf-8")
    return lines


def page(variants: Sequence[Variant], runs: Sequence[Run], lines: Sequence[Verdict], max_drift: float) -> str:
    """The report as Markdown."""
    parts = [
        "# Does the learning rate transfer over width?",
        "\n".join(f"- **{line.outcome}** {_plain(line.text)}" for line in lines),
        f"![Validation loss against learning rate]({RATE_FIGURE}.png)",
        "Validation loss against learning rate, a line for each width; bands: standard deviation over seeds; diamonds: optimum ± "
        f"standard error. Losses far above the best are cut off. [SVG]({RATE_FIGURE}.svg)",
        f"![Training loss against step]({STEP_FIGURE}.png)",
        "Training loss of all widths at one learning rate and, below, each width's less that of the next narrower one, in the "
        f"colour of the wider: where it is below the dotted line, wider is better. [SVG]({STEP_FIGURE}.svg)",
    ]
    if len(variants) > 2:
        parts += ["## Overview", _overview(variants, max_drift)]
    for variant in variants:
        parts += _section(variant)
    return "\n\n".join([*parts, "## Runs", _settings(runs), "## Words", WORDS.format(max_drift=max_drift)])


def _section(variant: Variant) -> list[str]:
    drift, order = variant.drift, variant.order
    ends = f"from width {variant.widths[0]} to {variant.widths[-1]}"
    same = "is" if drift.same_argmin else "is not"
    return [
        f"## {_title(variant)}",
        "Validation loss by width and log2(learning rate), each width's best in bold; "
        f"{count(len(variant.seeds), 'seed')}, {count(variant.diverged, 'run')} diverged:",
        _losses(variant),
        _optima(variant),
        f"{_sentence(drift_in_words(variant))}; signed, {ends}: {between(*drift.signed, drift.signed_stderr)}. "
        f"The best of the grid {same} the same at every width.",
        f"{_sentence(order_in_words(order))}.",
        *([_pairs(order)] if order.pairs else []),
    ]


def _losses(variant: Variant) -> str:
    def text(width: int, rate: float) -> str:
        cell = variant.cells.get((width, rate))
        shown = "" if cell is None else _cell(cell)
        return f"**{shown}**" if variant.best[width] == rate else shown

    rows = [[str(width), *(text(width, rate) for rate in variant.rates)] for width in variant.widths]
    return _table(["width", *map(_rate, variant.rates)], rows)


def _cell(cell: Cell) -> str:
    if cell.diverged:
        return "diverged" if cell.diverged == len(cell.losses) else f"diverged ({cell.diverged} of {len(cell.losses)})"
    return f"{cell.mean:.3f}" + ("" if cell.spread is None else f" ± {cell.spread:.3f}")


def _optima(variant: Variant) -> str:
    rows = []
    for width in variant.widths:
        optimum, best, stderr = variant.optima[width], variant.best[width], variant.stderr[width]
        alone = "no ±: a seed alone has no optimum" if stderr is None and optimum.found and len(variant.seeds) > 1 else ""
        rows.append(
            [
                str(width),
                between(optimum.low, optimum.high, stderr),
                "none" if best is None else _rate(best),
                _loss(variant.best_loss(width)),
                _penalty(variant, width),
                optimum.why or alone,
            ]
        )
    return _table(["width", "optimum, log2", "best of the grid", "its loss", "zero-shot penalty", ""], rows)


def _overview(variants: Sequence[Variant], max_drift: float) -> str:
    said = {True: "yes", False: "**no**", None: "not known"}
    rows = [
        [
            _title(variant),
            said[transfers(variant, max_drift)],
            between(variant.drift.octaves, variant.drift.octaves if variant.drift.found else math.inf, variant.drift.stderr),
            " / ".join(between(optimum.low, optimum.high) for optimum in variant.optima.values()),
            " / ".join(_loss(variant.best_loss(width)) for width in variant.widths),
            _penalty(variant, variant.widths[-1]),
            f"{variant.order.held} of {variant.order.compared}",
        ]
        for variant in variants
    ]
    head = ["variant", "transfers", "drift, octaves", "optimum by width, log2", "best loss by width"]
    return _table([*head, "zero-shot penalty at the widest", "wider is better"], rows)


def _pairs(order: Order) -> str:
    rows = []
    for pair in (pair for pair in order.pairs if pair.steps):
        worst = int(np.argmax(pair.difference))
        rows.append(
            [
                f"{pair.wide} less {pair.narrow}",
                f"{int(pair.holds.sum())} of {len(pair.steps)}",
                f"{nats(pair.difference[worst])} at step {pair.steps[worst]}",
                f"{2 * pair.noise:.4f}",
                nats(pair.difference[-1]),
                str(pair.seeds),
            ]
        )
    return _table(["widths", "not worse at", "largest difference", "2 x noise", "at the last step", "seeds"], rows)


def _settings(runs: Sequence[Run]) -> str:
    of = {name: [run for run in runs if run.variant == name] for name in dict.fromkeys(run.variant for run in runs)}
    keys = setting_keys(runs)
    common = [f"- `{key}` = {_plain(value[0])}" for key in keys if len(value := setting_values(runs, key)) == 1]
    rest = [key for key in keys if len(setting_values(runs, key)) > 1]
    own = [f"- {_plain(name)}: {', '.join(_own_setting(some, key) for key in rest)}" for name, some in of.items()]
    steps = " or ".join(map(str, sorted({run.steps for run in runs})))
    hours = sum(run.seconds for run in runs) / 3600
    return "\n\n".join(
        [
            f"{count(len(runs), 'run')} of {steps} steps, {hours:.2f} hours in all, compilation included. "
            "Settings other than the defaults, the same in all runs:",
            "\n".join(common or ["- none"]),
            *(["And those that are not:", "\n".join(own)] if rest else []),
        ]
    )


def _own_setting(runs: Sequence[Run], key: str) -> str:
    return f"`{key}` = {_plain(' or '.join(setting_values(runs, key)))}"


def _penalty(variant: Variant, width: int) -> str:
    penalty = variant.penalty[width]
    return "unknown" if penalty is None else "diverged" if math.isinf(penalty) else f"{penalty:.4f}"


def _title(variant: Variant) -> str:
    return _plain(variant.name) + (" (control)" if variant.control else "")


def _loss(loss: float) -> str:
    return "diverged" if math.isinf(loss) else f"{loss:.3f}"


def _rate(rate: float) -> str:
    return f"{rate:.4g}"


def _sentence(text: str) -> str:
    return _plain(text[0].upper() + text[1:])


def _plain(text: str) -> str:
    """Without a meaning to Markdown."""
    return re.sub(r"([\\`*_|<\[])", r"\\\1", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
