"""Check that activations and updates neither grow nor shrink with width (or depth).

Example: mutransformer coord-check small --widths 64,128,256,512,1024

Trains models of several widths for a few steps on one batch, and fits the slope of mean |x| against width for every activation,
its change by training, every weight's update and what weight decay removes of it. A slope fails if it differs from the one that
muP predicts by more than --max-slope and two standard errors. The standard parametrization runs beside it as a control that must
fail. With --depths it checks depth: completep and completed_p must stay flat, and grow without their rules for depth.

Exit code: 0 passes; 1 fails, or the control does not; 2 a mistake in the settings or options.

The check starts from these settings, which KEY=VALUE overrides: 16 rows of 128 tokens for each seed; a constant learning rate of
2^-8, larger than warm-up would give; float32; two layers.
"""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.commands import RUN_KEYS, start_jax
from mutransformer.config.load import is_file
from mutransformer.config.optim import DEPTH_RULES
from mutransformer.errors import FAILED, FINISHED, check
from mutransformer.mup.checks.slopes import MAX_SLOPE
from mutransformer.sharding import processes

KEYS = (*RUN_KEYS, "optim.rule", "optim.lr", "optim.name", "model.d_base", "model.n_layer", "model.n_layer_base")
PRESET = [
    "data.batch_size=16",
    "data.seq_len=128",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "optim.lr=0.00390625",
    "precision.compute=float32",
    "model.n_layer=2",
]
# The control, without the settings that the rule sp refuses.
STANDARD = ["optim.rule=sp", "optim.eps_scaling=false"]
STANDARD += [f"{key}=null" for key in ("model.n_layer_base", "optim.batch_base", "optim.tokens_base")]


def add_arguments(parser: ArgumentParser) -> None:
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--widths", default="64,128,256,512", help="values of model.d_model (default: %(default)s)")
    sizes.add_argument("--depths", help="values of model.n_layer instead: 2,4,8,16,32")
    add = parser.add_argument
    add("--steps", type=int, default=10, help="updates (default: %(default)s)")
    add("--seeds", default="0,1,2", help="seeds of weights and batch (default: %(default)s)")
    limit = "largest difference from the predicted slope that passes; exponents are multiples of 1/2 (default: %(default)s)"
    add("--max-slope", type=float, default=MAX_SLOPE, help=limit)
    add("--no-control", action="store_true", help="do not run the parametrization that must fail")
    add("--out", type=Path, help="folder of the results (default: WORKDIR/NAME-coord)")


def run(args: Namespace) -> int:
    from mutransformer.study.sweep import grid

    files = [arg for arg in args.settings if is_file(arg)]
    settings = [*files, *PRESET, *(arg for arg in args.settings if arg not in files)]
    axis = "depth" if args.depths else "width"
    sizes = grid.integers(f"--{axis}s", args.depths or args.widths)
    seeds = grid.seeds("--seeds", args.seeds)
    check(len(sizes) > 1, f"--{axis}s {sizes[0]}: one {axis} only: nothing to compare")
    check(args.steps >= 2, f"--steps {args.steps}: must be at least 2")
    check(0 < args.max_slope < math.inf, f"--max-slope {args.max_slope}: must be positive and finite")
    subject, control = grid.configs(settings, axis, sizes), []
    config, rule = subject[0].config, subject[0].config.optim.rule
    if axis == "width" and rule != "sp" and not args.no_control:
        control = grid.configs([*settings, *STANDARD], axis, sizes)
    if axis == "depth" and rule in DEPTH_RULES:
        if not args.no_control:
            control = grid.configs([*settings, "model.n_layer_base=null"], axis, sizes, label=f"{rule} without depth")
        if config.model.n_layer_base is None:
            subject = grid.configs([*settings, f"model.n_layer_base={sizes[0]}"], axis, sizes)
    out = args.out or config.rundir.with_name(f"{config.name}-coord")

    processes.simulate_devices(len(seeds))
    start_jax(config)
    from mutransformer.study.coordinates import coordinate_check

    verdicts = coordinate_check(subject, control, axis, seeds, args.steps, args.max_slope, out)
    print(*verdicts, f"results: {out}", sep="\n")
    return FAILED if any(verdict.outcome == "FAIL" for verdict in verdicts) else FINISHED
