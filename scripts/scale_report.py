"""Makes the plans of a folder with the real compiler, or prints their table: python scripts/scale_report.py results/scale

Each FILE.json there is the output of `mutransformer plan --compile --json`, all for TPUs or all for GPUs, and gives one row, in
the order of names. With --compile every plan that cases.yaml names is made again, one after the other. Once all are there, they
take the place of the old ones, and the tables in results/README.md and docs/performance.md are rewritten. It needs the compiler,
pip install -e '.[tpu]' or '.[cuda]', and neither a TPU nor a GPU. The same command continues after an interruption.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mutransformer.cli import run_cli
from mutransformer.errors import FINISHED, check

ROOT = Path(__file__).parents[1]
CASES, UNFINISHED, STATE = "cases.yaml", "unfinished", "state"
PAGES = ("results/README.md", "docs/performance.md")
HEADS = ("case | slice, mesh", "case | GPUs, mesh")  # how the tables of this script begin, of TPUs and of GPUs
# Rows of docs/performance.md by their first cell: the cases of the columns "here, full remat without flags", "here" and "here,
# unrolled".
ROWS = {
    "v5p 4x4x4, 64 x 1, 256": ("untuned-v5p-64x1-t256", "v5p-64x1-t256", "unrolled-v5p-64x1-t256"),
    "v5p 4x4x4, 16 x 4, 256": ("untuned-v5p-16x4-t256", "v5p-16x4-t256", "unrolled-v5p-16x4-t256"),
    "v5p 4x4x4, 64 x 1, 2048": ("untuned-v5p-64x1-t2048", "v5p-64x1-t2048", "unrolled-v5p-64x1-t2048"),
    "v5p 4x4x4, 16 x 4, 2048": ("untuned-v5p-16x4-t2048", "v5p-16x4-t2048", "unrolled-v5p-16x4-t2048"),
    "v5p 8x8x8, 64 x 8, 256, width 8192 (10 G)": (None, "v5p-wide-64x8", "unrolled-v5p-wide-64x8"),
    "v5e 8x8, 64 x 1, 256": (None, "v5e-64x1-t256", "unrolled-v5e-64x1-t256"),
    "v5e 8x8, 8 x 8, 256": (None, "v5e-8x8-t256", None),
}
# Rows of "What each setting changes" in results/README.md, by their first cell.
SETTINGS = {
    "defaults: `dots`, 64 x 1": "v5p-64x1-t256",
    "`model.unroll_layers=true`, 64 x 1": "unrolled-v5p-64x1-t256",
    "`model.remat=attention`": "remat-attention-v5p-64x1-t256",
    "full remat, no XLA flags": "untuned-v5p-64x1-t256",
    "defaults: `dots`, 2 overlap groups, reduce-scatter via all-to-all, 16 x 4": "v5p-16x4-t256",
    "`model.unroll_layers=true`, 16 x 4": "unrolled-v5p-16x4-t256",
    "plain reduce-scatters": "reduce-scatter-v5p-16x4-t256",
    "1 overlap group": "one-group-v5p-16x4-t256",
    "full remat, no XLA flags, 1 overlap group, plain reduce-scatters": "untuned-v5p-16x4-t256",
}

Plan = dict[str, Any]


def tpu_row(plan: Plan) -> dict[str, str]:
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


def gpu_row(plan: Plan) -> dict[str, str]:
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


def table(plans: Mapping[str, Plan], folder: Path) -> str:
    """The Markdown table of plans by name. Raises ConfigError if there are none, or they are for TPUs and for GPUs."""
    check(bool(plans), f"{folder}: contains no .json of plan.py --compile --json")
    rows = []
    for name, plan in plans.items():
        of_kind = gpu_row if "roofline" in plan["compiled"]["costings"] else tpu_row
        rows.append({"case": name} | of_kind(plan))
    check(len({tuple(each) for each in rows}) == 1, f"{folder}: contains plans for TPUs and for GPUs")
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(each.values()) for each in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read(folder: Path) -> dict[str, Plan]:
    """The plans in a folder by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def cases(folder: Path) -> dict[str, list[str]]:
    """The arguments of `mutransformer plan` by the name of the plan's file."""
    check((folder / CASES).is_file(), f"{folder}: has no {CASES}, which names the plans to make")
    named: dict[str, str] = yaml.safe_load((folder / CASES).read_text(encoding="utf-8"))
    return {name: [*shlex.split(arguments), "--compile", "--json"] for name, arguments in named.items()}


def make(name: str, arguments: Sequence[str]) -> str:
    """The output of `mutransformer plan`, in a process of its own: a compiler may take 10 GB, and does not give them back."""
    command = [sys.executable, "-m", "mutransformer", "plan", *arguments]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: ")
    check(done.returncode == 0, f"{name}: {reason}")
    check("step_seconds" in json.loads(done.stdout)["compiled"], f"{name}: the step does not fit into memory")
    return done.stdout


def compile_all(folder: Path, only: Sequence[str] = (), make: Callable[[str, Sequence[str]], str] = make) -> None:
    """Makes the plans that the folder's cases name, and puts them in place of the old ones once all are there.

    only: the names of some, which are compared with the committed ones and not put in place.
    """
    todo, new = cases(folder), folder / UNFINISHED
    unknown = sorted(set(only) - todo.keys())
    check(not unknown, f"--only: {CASES} has no {', '.join(unknown)}")
    state, stored = _state(todo), new / STATE
    if new.exists() and (not stored.is_file() or stored.read_text(encoding="utf-8") != state):
        shutil.rmtree(new)  # of other code, cases or versions
    new.mkdir(exist_ok=True)
    for file, text in ((".gitignore", "*\n"), (STATE, state)):
        (new / file).write_text(text, encoding="utf-8")
    chosen = {name: arguments for name, arguments in todo.items() if not only or name in only}
    old = read(folder)
    for i, (name, arguments) in enumerate(chosen.items(), start=1):
        path, began = new / f"{name}.json", time.monotonic()
        if not path.exists():
            print(f"[{i}/{len(chosen)}] {name}", end=": ", file=sys.stderr, flush=True)
            part = path.with_suffix(".part")
            part.write_text(make(name, arguments), encoding="utf-8")
            os.replace(part, path)
            before = f", was {_seconds(old[name]):.3f}" if name in old else ""
            after = _seconds(json.loads(path.read_text(encoding="utf-8")))
            print(f"{after:.3f} s a step{before}; took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if only:
        return
    for name in todo:
        os.replace(new / f"{name}.json", folder / f"{name}.json")
    for path in folder.glob("*.json"):
        if path.stem not in todo:
            path.unlink()
    shutil.rmtree(new)


def _state(todo: Mapping[str, Sequence[str]]) -> str:
    """What the plans depend on: the code, the cases, and the versions of JAX and the compilers."""
    digest = hashlib.sha256(json.dumps(todo).encode())
    for path in [*sorted((ROOT / "mutransformer").rglob("*.py")), *sorted((ROOT / "configs" / "scale").glob("*.yaml"))]:
        digest.update(path.read_bytes())
    versions = []
    for package in ("jax", "libtpu", "jax-cuda13-plugin"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{digest.hexdigest()} {', '.join(versions)}\n"


def _quoted(plan: Plan) -> dict[str, Any]:
    """The costing to quote: the first."""
    return next(iter(plan["compiled"]["costings"].values()))


def _seconds(plan: Plan) -> float:
    return _quoted(plan)["step_seconds"]


def _with_mfu(plan: Plan) -> str:
    quoted = _quoted(plan)
    return f"{quoted['step_seconds']:.3f} ({100 * quoted['mfu_6n']:.0f} %)"


def rewrite(text: str, plans: Mapping[str, Plan], made: str) -> str:
    """A page with the numbers of these plans: the table that this script makes, and the rows of ROWS and SETTINGS."""
    head = made.splitlines()[0]
    text = re.sub(rf"^{re.escape(head)}\n(\|.*\n)*", lambda _: made, text, flags=re.MULTILINE)
    lines = text.split("\n")
    for i, line in enumerate(lines):
        cells = line.strip("|").split(" | ")
        first = cells[0].strip()
        if first in ROWS and ROWS[first][1] in plans and len(cells) == 7:
            without, here, unrolled = ROWS[first]
            cells[3] = cells[3] if without is None else f"{_seconds(plans[without]):.3f}"
            cells[4] = _with_mfu(plans[here])
            cells[5] = cells[5] if unrolled is None else _with_mfu(plans[unrolled])
            lines[i] = f"| {' | '.join(cell.strip() for cell in cells)} |"
        elif first in SETTINGS and SETTINGS[first] in plans and len(cells) == 4:
            plan, quoted = plans[SETTINGS[first]], _quoted(plans[SETTINGS[first]])
            peak = plan["compiled"]["peak_bytes"] / 1e9
            numbers = f"{quoted['step_seconds']:.3f} | {quoted['exposed_seconds']:.3f} | {peak:.1f}"
            lines[i] = f"| {first} | {numbers} |"
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compile", action="store_true", help="make the plans again, and rewrite the tables in the docs")
    only = "with --compile: make these alone, to compare: nothing is put in place"
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help=only)
    args = parser.parse_args(argv)

    def run() -> int:
        check(args.compile or not args.only, "--only: needs --compile")
        if args.compile:
            compile_all(args.folder, args.only)
        if args.only:
            return FINISHED
        plans = read(args.folder)
        made = table(plans, args.folder)
        if args.compile:
            for page in PAGES:
                path = ROOT / page
                path.write_text(rewrite(path.read_text(encoding="utf-8"), plans, made), encoding="utf-8")
        print(made, end="")
        return FINISHED

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
