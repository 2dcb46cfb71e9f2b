"""Train every learning rate and seed at every size of a model, as many runs at once as fit on the devices.

Example: mutransformer sweep small --widths 64,128,256 --lrs 2^-10:2^-2:1 --seeds 0,1

The sizes are widths; or depths, numbers of steps or batch sizes, for `mutransformer report --over depth`, tokens or batch.

Writes one line per run to runs.jsonl in --out, for `mutransformer report`. The same command resumes an interrupted sweep.
"""

import math
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.commands import RUN_KEYS, start_jax
from mutransformer.errors import check
from mutransformer.sharding import processes

KEYS = (*RUN_KEYS, "steps", "model.d_base", "model.n_layer", "data.seq_len", "data.batch_size", "optim.rule", "optim.schedule")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--widths", help="values of model.d_model: 64,128,256")
    sizes.add_argument("--depths", help="values of model.n_layer instead: 2,4,8,16")
    sizes.add_argument("--steps", help="values of steps instead: 128,256,512,1024")
    sizes.add_argument("--batches", help="values of data.batch_size instead: 4,8,16,32")
    add("--lrs", required=True, help="values of optim.lr: 2^-10:2^-2:1 (first:last:octaves between) or 2^-6.5,2^-6,0.02")
    add("--seeds", default="0", help="values of seed: 0,1,2 (default: 0)")
    many = "sweep another setting too; several --set give all combinations"
    add("--set", "-s", action="append", default=[], metavar="KEY=VALUE,VALUE", help=many)
    add("--label", help="name of these settings in the results (default: the parametrization)")
    add("--out", type=Path, help="folder of the results (default: WORKDIR/NAME-sweep)")
    add("--cpu-devices", type=int, help="devices to simulate on a CPU (default: as many as it has cores)")
    add("--memory", type=float, help="GB per device that runs may use (default: what the device has)")


def run(args: Namespace) -> int:
    from mutransformer.study.sweep import grid

    axis: grid.SweepAxis = next(axis for axis, option in grid.SIZES.items() if vars(args)[option.removeprefix("--")] is not None)
    option = grid.SIZES[axis]
    sizes = grid.integers(option, vars(args)[option.removeprefix("--")])
    variants = grid.configs(args.settings, axis, sizes, args.set, args.label)
    grid.check_bases(variants)
    points = [(lr, seed) for lr in grid.rates("--lrs", args.lrs) for seed in grid.seeds("--seeds", args.seeds)]
    check(args.cpu_devices is None or args.cpu_devices >= 1, f"--cpu-devices {args.cpu_devices}: must be at least 1")
    check(args.memory is None or 0 < args.memory < math.inf, f"--memory {args.memory}: must be positive and finite")
    config = variants[0].config
    out = args.out or config.rundir.with_name(f"{config.name}-sweep")

    processes.simulate_devices(args.cpu_devices or min(os.cpu_count() or 1, len(points)))
    start_jax(config, trains=True)
    from mutransformer.study.sweep.run import sweep

    return sweep(variants, points, out, None if args.memory is None else int(args.memory * 1e9))
