"""Prints the table of results/scale as Markdown: python scripts/scale_report.py results/scale

Each FILE.json there is the output of `plan.py --compile --json`, and gives one row, in the order of names.
"""

import argparse
import json
import sys
from pathlib import Path

from mutransformer.cli import run_cli
from mutransformer.errors import FINISHED, check


def row(path: Path) -> list[str]:
    plan = json.loads(path.read_text(encoding="utf-8"))
    compiled, hybrid = plan["compiled"], plan["compiled"]["costings"]["hybrid"]
    state = sum(compiled["memory"][key] for key in ("parameters", "optimizer"))
    return [
        path.stem,
        f"{plan['topology']}, {' x '.join(map(str, plan['mesh'].values()))}",
        plan["remat"],
        f"{hybrid['step_seconds']:.3f}",
        f"{compiled['costings']['cycles']['step_seconds']:.3f}",
        f"{hybrid['mfu']:.1%}",
        f"{hybrid['mfu_6n']:.1%}",
        f"{hybrid['matmul_seconds']:.3f}",
        f"{hybrid['kernel_seconds']:.3f}",
        f"{hybrid['exposed_seconds']:.3f} of {hybrid['communication_seconds']:.3f}",
        f"{compiled['peak_bytes'] / 1e9:.1f}",
        f"{state / 1e9:.2f}",
    ]


HEADER = [
    *("case", "slice, mesh", "remat", "step, s", "step by cycles, s", "MFU", "MFU, 6N + 12LTd", "matmul, s", "kernels, s"),
    *("exposed of all comm., s", "peak, GB", "state, GB"),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)

    def run() -> int:
        paths = sorted(args.folder.glob("*.json"))
        check(bool(paths), f"{args.folder}: contains no .json of plan.py --compile --json")
        rows = [HEADER, ["---"] * len(HEADER), *(row(path) for path in paths)]
        print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
        return FINISHED

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
