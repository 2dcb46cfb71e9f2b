"""Predict what a run costs on a TPU slice: memory per chip, bounds of a step, time of the run.

Example: mutransformer plan huge --topology v5p-512 --mesh x=64,y=4

Immediate, by arithmetic on a trace of the train step; with --compile by the schedule that the TPU compiler makes of it, which
needs libtpu but no TPU. To measure a GPU or CPU at hand, use `mutransformer benchmark`.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.commands import SIZE_KEYS
from mutransformer.config.load import load
from mutransformer.errors import FINISHED, check

KEYS = ("steps", *SIZE_KEYS, "model.remat", "mesh.replicas", "mesh.overlap_groups", "optim.grad_accumulation_steps")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    chips = "v4, v5e, v5p or v6e chips; v5p:4x4x4 or Google's v5p-128 (default: %(default)s)"
    add("--topology", default="v5e:2x4", help=chips)
    add("--mesh", help="instead of the config's: x=16,y=4; without x it is what y leaves")
    add("--search", action="store_true", help="rank meshes, remat policies and microbatches that fit")
    add("--top", type=int, default=10, metavar="N", help="rows of --search (default: 10)")
    add("--compile", action="store_true", help="use the TPU compiler; with --search for the best few")
    add("--compile-top", type=int, default=3, metavar="N", help="how many --search compiles (default: 3)")
    add("--timeline", type=Path, metavar="FILE.png", help="draw one compiled step")
    add("--kernel-flops", action="append", default=[], metavar="REGEX=FLOPS", help="FLOPs per device of a Pallas kernel's call")
    add("--kernel-efficiency", type=float, default=0.5, metavar="SHARE", help="of peak in Pallas kernels (default: 0.5)")
    add("--json", action="store_true", help="print everything as JSON")


def run(args: Namespace) -> int:
    check(args.top >= 1 and args.compile_top >= 1, "--top and --compile-top: must be at least 1")
    check(args.timeline is None or args.compile, "--timeline: draws a compiled step: needs --compile")
    check(args.timeline is None or not args.search, "--timeline: draws one step; with --search there are several")
    config = load(args.settings)

    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: do not initialize an accelerator
    from rich.console import Console, Group

    from mutransformer.planning import asdict, case, chips, kernels, show
    from mutransformer.planning.estimate import estimate
    from mutransformer.planning.lower import compile_step, require_compiler
    from mutransformer.planning.search import by_policy, search
    from mutransformer.planning.simulate import simulate

    if args.compile:
        require_compiler()
    known = kernels.parse(args.kernel_flops, args.kernel_efficiency)
    topology = chips.parse(args.topology)
    if args.mesh:
        config = case.read_mesh(args.mesh, config)

    if args.search:
        ranked = search(config, topology, known)
        best = ranked[: args.compile_top] if args.compile else []
        compiled = {i: simulate(each.case, compile_step(each.case), known) for i, each in enumerate(best)}
        data = [
            asdict.of_case(each)
            | {"estimate": asdict.of_estimate(each)}
            | ({"compiled": asdict.of_simulated(compiled[i], each)} if i in compiled else {})
            for i, each in enumerate(ranked[: args.top])
        ]
        shown = show.ranking(ranked, compiled, args.top)
    else:
        estimated = estimate(case.make(config, topology), known)
        data = asdict.of_case(estimated) | {"estimate": asdict.of_estimate(estimated)}
        policies = by_policy(estimated, known)
        data["estimate"]["by_remat"] = {policy: asdict.of_estimate(each)["memory"] for policy, each in policies.items()}
        shown = show.estimated(estimated, policies)
        if args.compile:
            simulated = simulate(estimated.case, compile_step(estimated.case), known)
            data["compiled"] = asdict.of_simulated(simulated, estimated)
            shown = Group(shown, "", show.simulated(simulated, estimated))
            if args.timeline:
                from mutransformer.planning.timeline import draw

                draw(simulated, f"{config.name} on {topology}", args.timeline)
    if args.json:
        print(json.dumps(data, indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(shown)
    return FINISHED
