"""Judge from the results of sweeps whether a learning rate tuned at one width holds at the others.

Example: mutransformer report runs/small-sweep

Writes one page, report.md, with verdicts, figures and tables, and prints the verdicts. Exit code: 0 all pass; 1 one fails; 2
there is nothing to judge, or a mistake in the options.
"""

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from mutransformer.errors import FAILED, FINISHED


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("results", nargs="+", metavar="RESULTS", type=Path, help="a runs.jsonl or its folder; several are joined")
    add("--out", metavar="DIR", type=Path, help="where to write (default: report/ beside the first results file)")
    controls = "variants that should not transfer and decide nothing; besides sp and those whose names start with 'sp '"
    add("--control", nargs="+", action="extend", default=[], metavar="VARIANT", help=controls)
    add("--max-drift", metavar="OCTAVES", type=float, default=0.5, help="of the optimum over all widths (default: 0.5)")
    rate = "learning rate, 2^-6 or 0.015625, at which widths are compared step by step (default: the smallest width's best)"
    add("--lr", metavar="LR", type=log2, dest="rate", help=rate)


def run(args: Namespace) -> int:
    from mutransformer.study.sweep import records
    from mutransformer.study.transfer import report

    runs = records.join(args.results)
    beside = args.results[0] if args.results[0].is_dir() else args.results[0].parent
    out = args.out or beside / "report"
    lines = report.write(runs, out, args.max_drift, args.control, args.rate)
    print(*lines, f"report: {out / report.PAGE}", sep="\n")
    return FAILED if any(line.outcome == "FAIL" for line in lines) else FINISHED


def log2(text: str) -> float:
    """log2 of a learning rate, written 2^-6 or 0.015625."""
    base, _, exponent = text.partition("^")
    try:
        rate = float(exponent) if exponent and base == "2" else math.log2(float(text))
    except ValueError:
        rate = math.nan
    if not math.isfinite(rate):
        raise ArgumentTypeError(f"{text}: no learning rate; write 2^-6 or 0.015625")
    return rate
