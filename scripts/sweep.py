"""Trains every learning rate and seed of every width, as many at once as fit on the devices.

python scripts/sweep.py configs/small.yaml --widths 64,128,256 --lrs 2^-10:2^-2:1 --seeds 0,1 [key=value ...]

The runs go to runs.jsonl in --out, a line each, for scripts/transfer_report.py. Cut off, the same command goes on.
"""

import math
import os
import sys
from pathlib import Path

from mutransformer.config.schema import check
from mutransformer.sharding.processes import command, guarded, prepare_jax, simulate_devices


def main() -> int:
    parser = command(__doc__ or "")
    parser.add_argument("--widths", required=True, help="values of model.d_model: 64,128,256")
    parser.add_argument("--lrs", required=True, help="values of optim.lr: 2^-10:2^-2:1 (first:last:octaves between) or 0.01,0.02")
    parser.add_argument("--seeds", default="0", help="values of seed: 0,1,2; default 0")
    parser.add_argument(
        *("--set", "-s"),
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="sweep another setting too; several give all combinations",
    )
    parser.add_argument("--label", help="what to call these settings in results; default: the parametrization")
    parser.add_argument("--out", type=Path, help="folder of the results; default: WORKDIR/NAME-sweep")
    parser.add_argument("--cpu-devices", type=int, help="on a CPU: devices to simulate; default: as many as it has cores")
    parser.add_argument("--memory", type=float, help="GB that runs may take on a device; default: what it has")
    given = parser.parse_intermixed_args()
    return guarded(lambda: run(given))


def run(given) -> int:
    from mutransformer.study.sweep import grid

    widths = grid.integers("--widths", given.widths)
    jobs = grid.jobs(given.args, widths, given.set, given.label)
    points = [(lr, seed) for lr in grid.rates("--lrs", given.lrs) for seed in grid.seeds("--seeds", given.seeds)]
    check(given.cpu_devices is None or given.cpu_devices >= 1, f"--cpu-devices {given.cpu_devices}: must be at least 1")
    check(given.memory is None or 0 < given.memory < math.inf, f"--memory {given.memory}: must be positive")
    config = jobs[0].config
    out = given.out or config.rundir.with_name(f"{config.name}-sweep")

    simulate_devices(given.cpu_devices or min(os.cpu_count() or 1, len(points)))
    prepare_jax(config.distributed)
    from mutransformer.study.sweep.run import sweep
    from mutransformer.training.metrics import setup_logging

    setup_logging()
    return sweep(jobs, points, out, None if given.memory is None else int(given.memory * 1e9))


if __name__ == "__main__":
    sys.exit(main())
