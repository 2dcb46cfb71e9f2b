"""Checks that nothing grows or falls with width: python scripts/coord_check.py configs/small.yaml [key=value ...]

Trains models of several widths for a few steps on one batch, and fits the slope of mean |x| against width for every activation,
its change by training, and every weight's update. The standard parametrization runs beside it and must fail. With --depths it
checks depth: completep and completed_p must stay flat, and grow if their rules for depth are off.

Exit code: 0 passes; 1 fails, or the control does not; 2 a mistake in what was given.

Settings for the check, which your key=value may override: one row of 32 tokens a seed, since with more tokens than features Adam
adds up conflicting gradients and a slope of its own comes in; a constant learning rate of 2^-8, larger than warm-up would give;
float32; eps 1e-15, since a fixed eps stops the updates of wide models, whose gradients are small; two layers.
"""

import sys
from pathlib import Path

from mutransformer.config import load as settings
from mutransformer.config.schema import DEPTH_RULES, check
from mutransformer.sharding.processes import FAILED, FINISHED, command, guarded, prepare_jax, simulate_devices

PRESET = [
    *("data.batch_size=1", "data.seq_len=32", "optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=0.00390625"),
    *("optim.eps=1e-15", "precision.compute=float32", "model.n_layer=2"),
]
# The control, and off with what it has no use for.
STANDARD = [
    *("optim.rule=sp", "model.n_layer_base=null", "optim.batch_base=null", "optim.tokens_base=null", "optim.eps_scaling=false"),
]


def main() -> int:
    parser = command(__doc__ or "")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--widths", default="64,128,256,512,1024", help="values of model.d_model; default: %(default)s")
    sizes.add_argument("--depths", help="values of model.n_layer instead: 2,4,8,16,32")
    parser.add_argument("--steps", type=int, default=10, help="updates; default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="of weights and batch; default: %(default)s")
    parser.add_argument("--max-slope", type=float, default=0.05, help="that passes; default: %(default)s")
    parser.add_argument("--no-control", action="store_true", help="do not run the parametrization that must fail")
    parser.add_argument("--out", type=Path, help="folder of the results; default: WORKDIR/NAME-coord")
    given = parser.parse_intermixed_args()
    return guarded(lambda: run(given))


def run(given) -> int:
    from mutransformer.study.sweep import grid

    files = [arg for arg in given.args if settings.is_file(arg)]
    args = [*files, *PRESET, *(arg for arg in given.args if arg not in files)]
    axis = "depth" if given.depths else "width"
    at = grid.integers(f"--{axis}s", given.depths or given.widths)
    seeds = grid.seeds("--seeds", given.seeds)
    check(len(at) > 1, f"--{axis}s {at[0]}: one {axis} only: nothing to compare")
    check(given.steps >= 2, f"--steps {given.steps}: must be at least 2")
    check(0 < given.max_slope < float("inf"), f"--max-slope {given.max_slope}: must be positive")
    subject = grid.along(args, axis, at)
    rule = subject[0].config.optim.rule
    control = []
    if axis == "width":
        if rule != "sp" and not given.no_control:
            control = grid.along([*args, *STANDARD], axis, at)
    elif rule in DEPTH_RULES:
        if not given.no_control:
            control = grid.along([*args, "model.n_layer_base=null"], axis, at, label=f"{rule} without depth")
        if subject[0].config.model.n_layer_base is None:
            subject = grid.along([*args, f"model.n_layer_base={at[0]}"], axis, at)
    config = subject[0].config
    out = given.out or config.rundir.with_name(f"{config.name}-coord")

    simulate_devices(len(seeds))
    prepare_jax(config.distributed)
    from mutransformer.study.coordinates.report import coordinate_check
    from mutransformer.study.coordinates.slopes import Limits
    from mutransformer.training.metrics import setup_logging

    setup_logging()
    verdicts = coordinate_check(subject, control, axis, seeds, given.steps, Limits(slope=given.max_slope), out)
    print(*verdicts, f"results: {out}", sep="\n")
    return FAILED if any(verdict.outcome == "FAIL" for verdict in verdicts) else FINISHED


if __name__ == "__main__":
    sys.exit(main())
