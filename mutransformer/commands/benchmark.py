"""Measure tokens per second of the train step, as JSON.

Example: mutransformer benchmark small model.d_model=512

Random tokens that stay on the devices; compilation and warm-up do not count. Quote the median over repeats, tokens_per_second.
With log.layers=N also what it costs to measure the layers every N steps, by repeats with and without in turn: layers_overhead.
"""

import json
import math
import os
import statistics
import time
from argparse import ArgumentParser, Namespace

from mutransformer.commands import SIZE_KEYS
from mutransformer.config.load import load
from mutransformer.errors import FINISHED, check
from mutransformer.sharding import processes

KEYS = (*SIZE_KEYS, "model.remat", "precision.compute", "optim.grad_accumulation_steps", "mesh.x", "mesh.y")


def add_arguments(parser: ArgumentParser) -> None:
    for option, kind, default, meaning in (("seconds", float, "2", "of a repeat"), ("repeats", int, "5", "of the measurement")):
        name = f"BENCHMARK_{option.upper()}"
        default = os.environ.get(name, default)
        parser.add_argument(f"--{option}", type=kind, default=default, help=f"{meaning} (default: {default}, set by {name})")


def run(args: Namespace) -> int:
    check(args.seconds > 0, f"--seconds {args.seconds}: must be positive")
    check(args.repeats >= 1, f"--repeats {args.repeats}: must be at least 1")
    config = load(args.settings)
    processes.prepare_jax(config)
    import jax
    import numpy as np

    from mutransformer.data.batches.rows import Batch
    from mutransformer.sharding.devices import memory_in_use, peak_flops
    from mutransformer.sharding.mesh import data_share, put_batch
    from mutransformer.training.layer_sizes import LayerSizes
    from mutransformer.training.program import Vocabulary, build
    from mutransformer.training.step import make_train_step

    program = build(config, vocabulary=Vocabulary(config.model.n_vocab or config.data.vocab_size))
    mesh = program.mesh
    n_blocks, blocks = data_share(mesh)
    rows = config.data.batch_size // n_blocks * len(blocks)
    tokens = np.random.default_rng(0).integers(0, program.vocabulary.n_vocab, (rows, config.data.seq_len), dtype=np.int32)
    segments = np.zeros_like(tokens) if config.data.intra_document_mask else None
    batch = put_batch(Batch(tokens, np.ones_like(tokens, dtype=bool), segments), mesh)

    state = program.init_state()
    began = time.perf_counter()
    step = make_train_step(program).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began

    began, every = time.perf_counter(), config.log.layers
    layers = LayerSizes(program, state, batch) if every else None
    layers_compile_seconds = time.perf_counter() - began

    def seconds_per_step(n: int, layers: LayerSizes | None = None) -> float:
        nonlocal state
        began = time.perf_counter()
        for i in range(1, n + 1):
            measuring = layers if layers and i % every == 0 else None
            before = measuring and measuring.before(state, batch)
            state, metrics = step(state, batch)
            if measuring and before:
                measuring.layout.split(np.asarray(measuring.after(before, state, metrics)))
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / n

    seconds_per_step(1)
    if layers:
        seconds_per_step(every, layers)
    n = max(1, round(args.seconds / seconds_per_step(2)))
    n += -n % (every or 1)
    pairs = []
    for _ in range(args.repeats):
        pairs.append((seconds_per_step(n), seconds_per_step(n, layers) if layers else math.nan))
    rates = sorted(config.tokens_per_step / without for without, _ in pairs)
    overheads = sorted(measured / without - 1 for without, measured in pairs)
    median = statistics.median(rates)
    peak = peak_flops(program.execution.device_kind)
    memory = memory_in_use(jax.local_devices())
    report = {
        "tokens_per_second": round(median),
        "range": [round(rates[0]), round(rates[-1])],
        "step_seconds": round(config.tokens_per_step / median, 5),
        "model_flops_per_second": round(median * program.flops_per_token),
        "mfu": peak and round(median * program.flops_per_token / (mesh.size * peak), 4),
        "compile_seconds": round(compile_seconds, 2),
        "peak_bytes": memory and memory["peak_bytes"],
        "parameters": program.n_params,
        "tokens_per_step": config.tokens_per_step,
        "steps_per_repeat": n,
        "repeats": args.repeats,
        "devices": f"{mesh.size} x {program.execution.device_kind}",
        "mesh": dict(mesh.shape),
        "compute": program.config.precision.compute,
        "jax": jax.__version__,
    }
    if every:
        report |= {
            "layers_every": every,
            "layers_overhead": round(statistics.median(overheads), 4),
            "layers_overhead_range": [round(overheads[0], 4), round(overheads[-1], 4)],
            "layers_compile_seconds": round(layers_compile_seconds, 2),
        }
    if jax.process_index() == 0:
        print(json.dumps(report, indent=2))
    return FINISHED
