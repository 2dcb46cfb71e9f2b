"""What a run will cost on a TPU slice, before one is rented: memory, bounds of a step, time of the run.

python scripts/plan.py configs/huge.yaml --topology v5p-512 [--mesh x=64,y=4] [--search] [--compile] [key=value ...]

At once, by arithmetic on a trace of the train step; with --compile by the schedule that the TPU compiler makes of it (libtpu is
needed, a TPU is not). What a GPU or CPU at hand does, scripts/benchmark.py measures.
"""

import json
import sys
from pathlib import Path

from mutransformer.config import load as settings
from mutransformer.config.schema import check
from mutransformer.sharding.processes import FINISHED, command, guarded


def main(argv=None) -> int:
    parser = command(__doc__ or "")
    add = parser.add_argument
    add("--topology", default="v5e:2x4", help="chips: v4, v5e, v5p or v6e; v5p:4x4x4 or Google's v5p-128; default: v5e:2x4")
    add("--mesh", help="instead of the config's: x=16,y=4; x is what y leaves if it is not given")
    add("--search", action="store_true", help="rank meshes, remat policies and microbatches that fit")
    add("--top", type=int, default=10, metavar="N", help="rows of --search; default: 10")
    add("--compile", action="store_true", help="ask the TPU compiler; with --search for the best few")
    add("--compile-top", type=int, default=3, metavar="N", help="how many --search compiles; default: 3")
    add("--timeline", type=Path, metavar="FILE.png", help="draw one compiled step")
    add("--kernel-flops", action="append", default=[], metavar="REGEX=FLOPS", help="of a call of a Pallas kernel, on a device")
    add("--kernel-efficiency", type=float, default=0.5, metavar="SHARE", help="of peak that Pallas kernels reach; default: 0.5")
    add("--json", action="store_true", help="all as JSON on standard output")
    given = parser.parse_intermixed_args(argv)
    return guarded(lambda: run(given))


def run(given) -> int:
    check(given.top >= 1 and given.compile_top >= 1, "--top and --compile-top: must be at least 1")
    check(given.timeline is None or given.compile, "--timeline: draws a compiled step: needs --compile")
    check(given.timeline is None or not given.search, "--timeline: draws one step; with --search there are several")
    config = settings.load(given.args)

    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: no accelerator is to be woken
    from rich.console import Console, Group

    from mutransformer.planning import asdict, case, chips, kernels, show
    from mutransformer.planning.estimate import estimate
    from mutransformer.planning.lower import compile_step, require_compiler
    from mutransformer.planning.search import by_policy, search
    from mutransformer.planning.simulate import simulate

    if given.compile:
        require_compiler()
    known = kernels.parse(given.kernel_flops, given.kernel_efficiency)
    topology = chips.parse(given.topology)
    if given.mesh:
        config = case.read_mesh(given.mesh, config)

    if given.search:
        found = search(config, topology, known)
        best = found[: given.compile_top] if given.compile else []
        compiled = {i: simulate(each.case, compile_step(each.case), known) for i, each in enumerate(best)}
        data = [
            asdict.of_case(each)
            | {"estimate": asdict.of_estimate(each)}
            | ({"compiled": asdict.of_simulated(compiled[i], each)} if i in compiled else {})
            for i, each in enumerate(found[: given.top])
        ]
        shown = show.ranking(found, compiled, given.top)
    else:
        found = estimate(case.make(config, topology), known)
        data = asdict.of_case(found) | {"estimate": asdict.of_estimate(found)}
        policies = by_policy(found, known)
        data["estimate"]["by_remat"] = {policy: asdict.of_estimate(each)["memory"] for policy, each in policies.items()}
        shown = show.estimated(found, policies)
        if given.compile:
            real = simulate(found.case, compile_step(found.case), known)
            data["compiled"] = asdict.of_simulated(real, found)
            shown = Group(shown, "", show.simulated(real, found))
            if given.timeline:
                from mutransformer.planning.timeline import draw

                draw(real, f"{config.name} on {topology}", given.timeline)
    if given.json:
        print(json.dumps(data, indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(shown)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
