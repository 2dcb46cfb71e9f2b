"""Predict what a run costs on TPUs or GPUs that are not at hand: memory per device, bounds of a step, time of the run.

Example: mutransformer plan huge --topology v5p-512 --mesh x=64,y=4

Immediate, by arithmetic on a trace of the train step; with --compile by the schedule that the real compiler makes of it, which
needs its package, libtpu or the CUDA plugin, but no TPU or GPU. To measure a device at hand, use `mutransformer benchmark`.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mutransformer.commands import SIZE_KEYS
from mutransformer.config.load import load
from mutransformer.errors import FINISHED, check

HERE = "here"  # the name of this machine
KEYS = ("steps", *SIZE_KEYS, "model.remat", "mesh.replicas", "mesh.overlap_groups", "optim.grad_accumulation_steps")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    tpus = "TPU v4, v5e, v5p, v6e: v5p:4x4x4 or Google's v5p-128"
    gpus = "GPU a100, h100, h200, b200, gb200: h100:8, or h100:4x8 for 4 nodes of 8"
    add("--topology", default="v5e:2x4", help=f"{tpus}; {gpus}; here: this machine (default: %(default)s)")
    add("--mesh", help="instead of the config's: x=16,y=4; without x it is what y leaves")
    add("--search", action="store_true", help="rank meshes, remat policies and microbatches that fit")
    add("--top", type=int, default=10, metavar="N", help="rows of --search (default: 10)")
    add("--compile", action="store_true", help="use the real compiler; with --search for the best few")
    add("--compile-top", type=int, default=3, metavar="N", help="how many --search compiles (default: 3)")
    add("--timeline", type=Path, metavar="FILE.png", help="draw one compiled step")
    add("--kernel-flops", action="append", default=[], metavar="REGEX=FLOPS", help="FLOPs per device of a Pallas kernel's call")
    add("--kernel-efficiency", type=float, default=0.5, metavar="SHARE", help="of peak in Pallas kernels (default: 0.5)")
    add("--json", action="store_true", help="print everything as JSON")


def run(args: Namespace) -> int:
    check(args.top >= 1 and args.compile_top >= 1, "--top and --compile-top: must be at least 1")
    check(args.timeline is None or args.compile, "--timeline: draws a compiled step: needs --compile")
    check(args.timeline is None or not args.search, "--timeline: draws one step; with --search there are several")
    check(args.mesh is None or not args.search, "--mesh: --search tries every mesh; give one of them")
    config = load(args.settings)
    for text in config.warnings():
        print(f"warning: {text}", file=sys.stderr)

    import jax

    if args.topology != HERE:
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: do not initialize an accelerator
    from rich.console import Console

    from mutransformer.planning.kernel_flops import parse_kernel_flops
    from mutransformer.planning.plan import plan, rank

    kernels = parse_kernel_flops(args.kernel_flops, args.kernel_efficiency)
    if args.search:
        compile_top = args.compile_top if args.compile else 0
        result = rank(config, args.topology, top=args.top, compile_top=compile_top, kernels=kernels)
    else:
        result = plan(config, args.topology, mesh=args.mesh, compile=args.compile, kernels=kernels)
        if args.timeline and result.simulated:
            from mutransformer.planning.timeline import draw

            draw(result.simulated, f"{config.name} on {result.estimate.scenario.topology}", args.timeline)
    if args.json:
        print(json.dumps(result.as_json(), indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(result)
    return FINISHED
