"""Says whether a learning rate tuned on a small model can be used on a wide one: python scripts/transfer_report.py runs/sweep

Reads the results of sweeps and writes one page, report.md, with verdicts, figures and tables. The verdicts are printed as well.
Exit code: 0 all pass; 1 one fails; 2 there is nothing to judge, or a mistake in what was given.
"""

import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from mutransformer.sharding.processes import FAILED, guarded


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", metavar="RESULTS", type=Path, help="a runs.jsonl, or a folder that holds one; several are joined")
    add("--out", metavar="DIR", type=Path, help="where to write; default: report/ beside the first results file")
    add(
        "--control",
        nargs="+",
        action="extend",
        default=[],
        metavar="VARIANT",
        help="variants that should not transfer, and decide nothing; besides sp and those whose names start with 'sp '",
    )
    add("--max-drift", metavar="OCTAVES", type=float, default=0.5, help="of the optimum over all widths; default: 0.5")
    add(
        "--lr",
        metavar="LR",
        type=log2,
        dest="rate",
        help="at which widths are compared step by step, 2^-6 or 0.015625; default: the smallest width's best of the grid",
    )
    given = parser.parse_args(argv)

    def run() -> int:
        from mutransformer.study.sweep import records
        from mutransformer.study.transfer import report

        runs = records.join(given.results)
        beside = given.results[0] if given.results[0].is_dir() else given.results[0].parent
        out = given.out or beside / "report"
        lines = report.write(runs, out, given.max_drift, given.control, given.rate)
        print(*lines, f"report: {out / report.PAGE}", sep="\n")
        return FAILED if any(line.outcome == "FAIL" for line in lines) else 0

    return guarded(run)


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


if __name__ == "__main__":
    sys.exit(main())
