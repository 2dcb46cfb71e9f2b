"""Prints the table of a folder of compiled plans as Markdown: python scripts/scale_report.py results/scale

Each FILE.json there is the output of `mutransformer plan --compile --json`, all for TPUs or all for GPUs, and gives one row, in
the order of names.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mutransformer.cli import run_cli
from mutransformer.errors import FINISHED, check


def tpu_row(plan: dict[str, Any]) -> dict[str, str]:
    compiled, hybrid = plan["compiled"], plan["compiled"]["costings"]["hybrid"]
    state = sum(compiled["memory"][key] for key in ("parameters", "optimizer"))
    return {
        "slice, mesh": f"{plan['topology']}, {' x '.join(map(str, plan['mesh'].values()))}",
        "remat": plan["remat"],
        "step, s": f"{hybrid['step_seconds']:.3f}",
        "step by cycles, s": f"{compiled['costings']['cycles']['step_seconds']:.3f}",
        "MFU": f"{hybrid['mfu']:.1%}",
        "MFU, 6N + 12LTd": f"{hybrid['mfu_6n']:.1%}",
        "matmul, s": f"{hybrid['matmul_seconds']:.3f}",
        "kernels, s": f"{hybrid['kernel_seconds']:.3f}",
        "exposed of all comm., s": f"{hybrid['exposed_seconds']:.3f} of {hybrid['communication_seconds']:.3f}",
        "peak, GB": f"{compiled['peak_bytes'] / 1e9:.1f}",
        "state, GB": f"{state / 1e9:.2f}",
    }


def gpu_row(plan: dict[str, Any]) -> dict[str, str]:
    compiled, roofline = plan["compiled"], plan["compiled"]["costings"]["roofline"]
    collectives = compiled["overlap"]
    at_once = sum(not each["beside"] for each in collectives)
    return {
        "GPUs, mesh": f"{plan['topology']}, {' x '.join(map(str, plan['mesh'].values()))}",
        "remat": plan["remat"],
        "microbatches": str(plan["grad_accumulation_steps"]),
        "step, s": f"{roofline['step_seconds']:.3f}",
        "MFU": f"{roofline['mfu']:.1%}",
        "MFU, 6N + 12LTd": f"{roofline['mfu_6n']:.1%}",
        "matmul, s": f"{roofline['matmul_seconds']:.3f}",
        "kernels, s": f"{roofline['kernel_seconds']:.3f}",
        "other, s": f"{roofline['other_seconds']:.3f}",
        "exposed of all comm., s": f"{roofline['exposed_seconds']:.3f} of {roofline['communication_seconds']:.3f}",
        "collectives waited for at once": f"{at_once} of {len(collectives)}",
        "peak, GB": f"{compiled['peak_bytes'] / 1e9:.1f}",
    }


def row(path: Path) -> dict[str, str]:
    plan = json.loads(path.read_text(encoding="utf-8"))
    return {"case": path.stem} | (gpu_row if "roofline" in plan["compiled"]["costings"] else tpu_row)(plan)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)

    def run() -> int:
        rows = [row(path) for path in sorted(args.folder.glob("*.json"))]
        check(bool(rows), f"{args.folder}: contains no .json of plan.py --compile --json")
        check(len({tuple(each) for each in rows}) == 1, f"{args.folder}: contains plans for TPUs and for GPUs")
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(each.values()) for each in rows)]
        print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
        return FINISHED

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
