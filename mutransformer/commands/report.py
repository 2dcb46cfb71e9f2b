"""Judge from the results of sweeps whether a learning rate tuned at one width holds at the others.

Example: mutransformer report runs/small-sweep

Writes one page, report.md, with verdicts, figures and tables, the tables also as CSV and LaTeX, and prints the verdicts. Exit
code: 0 all pass; 1 one fails, or is UNKNOWN, which the runs do not determine; 2 there is nothing to judge, or a mistake in the
options.
"""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.errors import FAILED, FINISHED


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("results", nargs="+", metavar="RESULTS", type=Path, help="a runs.jsonl or its folder; several are joined")
    add("--out", metavar="DIR", type=Path, help="where to write (default: report/ beside the first results file)")
    controls = "variants that should not transfer and decide nothing; besides sp and those whose names start with 'sp '"
    add("--control", nargs="+", action="extend", default=[], metavar="VARIANT", help=controls)
    over = "what grows: the width, or what a sweep over --depths, --steps or --batches varied (default: width)"
    add("--over", choices=("width", "depth", "tokens", "batch"), default="width", help=over)
    add("--max-drift", metavar="OCTAVES", type=float, default=0.5, help="of the optimum over all sizes (default: 0.5)")
    rate = "learning rate, 2^-6.5 or 0.011, at which widths are compared step by step (default: the smallest width's best)"
    add("--lr", metavar="LR", help=rate)


def run(args: Namespace) -> int:
    from mutransformer.mup.checks.verdict import passed
    from mutransformer.study.sweep import grid, records
    from mutransformer.study.transfer import report

    rate = None if args.lr is None else math.log2(grid.one_rate("--lr", args.lr))
    runs = records.join(args.results)
    beside = args.results[0] if args.results[0].is_dir() else args.results[0].parent
    out = args.out or beside / "report"
    lines = report.write(runs, out, args.max_drift, args.control, rate, args.over)
    print(*lines, f"report: {out / report.PAGE}", sep="\n")
    return FINISHED if passed(lines) else FAILED
