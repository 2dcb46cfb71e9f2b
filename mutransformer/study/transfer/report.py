"""The transfer report: verdicts, one Markdown page with figures and tables, and the tables as CSV and LaTeX."""

import math
from collections.abc import Sequence
from pathlib import Path

from mutransformer.errors import check, translate_errors
from mutransformer.mup.checks.transfer import analyze
from mutransformer.mup.checks.transfer_verdicts import judge
from mutransformer.mup.checks.verdict import CheckError, Verdict, count
from mutransformer.study.sweep.grid import SweepAxis
from mutransformer.study.sweep.records import AXES, Run, setting_of
from mutransformer.study.transfer import tables
from mutransformer.study.transfer.page import RATE_FIGURE, STEP_FIGURE, TRANSFER_FIGURE, page

PAGE, LATEX, OPTIMA, LOSSES = "report.md", "tables.tex", "optima.csv", "losses.csv"


def write(
    runs: Sequence[Run],
    out: Path,
    max_drift: float,
    controls: Sequence[str] = (),
    rate: float | None = None,
    over: SweepAxis = "width",
) -> list[Verdict]:
    """Writes the page, its figures and the tables to a folder. Equal runs give equal bytes.

    Runs, controls and rate are those of `analyze`, max_drift is in octaves, `over` is what grows from model to model. Raises
    ConfigError as `analyze` does, and if max_drift is out of range or matplotlib is missing.
    """
    from mutransformer.study import figures  # needs matplotlib, which is an extra
    from mutransformer.study.transfer import curves

    check(0 <= max_drift < math.inf, f"--max-drift {max_drift}: must be 0 or more, in octaves")
    with translate_errors("", CheckError):
        variants = analyze(runs, controls, rate, AXES[over])
    verdicts = judge(variants, runs, max_drift, ended_in_warm_up(runs))
    out.mkdir(parents=True, exist_ok=True)
    subject = variants[0]
    control = next((variant for variant in variants if variant.control), None)
    figures.save(curves.transfer, subject, control, path=out / TRANSFER_FIGURE)
    figures.save(curves.loss_against_rate, variants, path=out / RATE_FIGURE)
    if subject.ordering is not None:
        figures.save(curves.loss_against_step, variants, path=out / STEP_FIGURE)
    (out / PAGE).write_text(page(variants, runs, verdicts, max_drift), encoding="utf-8")
    (out / OPTIMA).write_text(tables.optima_csv(variants), encoding="utf-8")
    (out / LOSSES).write_text(tables.losses_csv(variants), encoding="utf-8")
    (out / LATEX).write_text(tables.latex(variants), encoding="utf-8")
    return verdicts


def ended_in_warm_up(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By variant, that runs ended before their learning rate had reached its full value: they say nothing about it."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        by_share = setting_of(run, "optim.warmup_fraction") is not None  # less than the run, whatever its length
        if not by_share and setting_of(run, "optim.warmup_steps") >= run.steps:
            found.setdefault(run.variant, []).append(run)
    doubts = {}
    for name, early in found.items():
        steps = " or ".join(map(str, sorted({run.steps for run in early})))
        warmup = " or ".join(map(str, sorted({setting_of(run, "optim.warmup_steps") for run in early})))
        text = f"{count(len(early), 'run')} of {steps} steps ended within the warm-up of {warmup} steps"
        doubts[name] = [f"{text}; set optim.warmup_steps to less, or steps to more"]
    return doubts
