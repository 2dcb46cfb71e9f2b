"""Measure tokens per second of the train step, as JSON; or report on all of the hardware at hand.

Example: mutransformer benchmark small model.d_model=512

Random tokens that stay on the devices; compilation and warm-up do not count. Quote the median over repeats, tokens_per_second.
With log.layers=N also what it costs to measure the layers every N steps, by repeats with and without in turn: layers_overhead.

With --report: kernels against the plain formula, tokens/s and MFU at three sizes beside the plan, a trace in words, the speed of
sweeps and a short transfer, in one folder to put into an issue; at most 8 minutes on a GPU, 10 on a CPU. It chooses its own
configs, and takes settings of precision, mesh, xla and attention. The same command continues a report. Exit code: 0; 1 if a
section failed.
"""

import json
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.commands import SIZE_KEYS
from mutransformer.config.load import is_file, load
from mutransformer.errors import FINISHED, check
from mutransformer.sharding import processes

KEYS = (*SIZE_KEYS, "model.remat", "precision.compute", "optim.grad_accumulation_steps", "mesh.x", "mesh.y")
# Settings that a report takes: those that the sizes of its configs do not depend on.
OF_REPORT = ("precision.", "mesh.", "xla", "model.attention_kernel=", "data.cache_dir=", "data.source=", "data.files=")
OF_REPORT += ("data.tokenizer=",)


def add_arguments(parser: ArgumentParser) -> None:
    for option, kind, default, meaning in (("seconds", float, "2", "of a repeat"), ("repeats", int, "5", "of the measurement")):
        name = f"BENCHMARK_{option.upper()}"
        default = os.environ.get(name, default)
        parser.add_argument(f"--{option}", type=kind, default=default, help=f"{meaning} (default: {default}, set by {name})")
    parser.add_argument("--report", action="store_true", help="write a folder with a report on this hardware")
    parser.add_argument("--out", type=Path, help="folder of the report (default: in WORKDIR/hardware, by device and version)")


def run(args: Namespace) -> int:
    check(args.seconds > 0, f"--seconds {args.seconds}: must be positive")
    check(args.repeats >= 1, f"--repeats {args.repeats}: must be at least 1")
    check(args.report or args.out is None, "--out: is the folder of a report: needs --report")
    config = load(args.settings)
    if args.report:
        return _report(args.settings, args.out, Path(config.workdir))
    processes.prepare_jax(config)
    import jax

    from mutransformer.study.hardware.step_time import StepTimer, build_alone, figures, layer_overheads

    program, every = build_alone(config), config.log.layers
    timer = StepTimer(program)
    n, overheads = timer.steps_of(args.seconds), {}
    if every:
        n += -n % every
        times, overheads = layer_overheads(timer, n, args.repeats, every)
    else:
        times = [timer.seconds_per_step(n) for _ in range(args.repeats)]
    report = figures(timer, times) | {
        "steps_per_repeat": n,
        "repeats": args.repeats,
        "devices": f"{program.mesh.size} x {program.execution.device_kind}",
        "mesh": dict(program.mesh.shape),
        "compute": program.config.precision.compute,
        "jax": jax.__version__,
    }
    if jax.process_index() == 0:
        print(json.dumps(report | overheads, indent=2))
    return FINISHED


def _report(settings: list[str], out: Path | None, workdir: Path) -> int:
    from mutransformer.study.hardware.report import PAGE, write

    for setting in settings:
        allowed = not is_file(setting) and setting.startswith((*OF_REPORT, "workdir="))
        taken = ", ".join(key.rstrip(".=") for key in OF_REPORT)
        check(allowed, f"{setting}: --report chooses its own configs; it takes settings of {taken}")
    code, folder = write(out, [each for each in settings if not each.startswith("workdir=")], workdir=workdir)
    print(folder / PAGE)
    return code
