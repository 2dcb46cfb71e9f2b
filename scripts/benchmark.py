"""Tokens a second of the train step, as JSON: python scripts/benchmark.py configs/small.yaml [key=value ...]

Random tokens, resting on the devices; compilation and warm-up do not count. The environment variables BENCHMARK_SECONDS (2) and
BENCHMARK_REPEATS (5) set how long a repeat runs and how many there are; the median over repeats is the figure to quote.
"""

import json
import os
import statistics
import sys
import time

from mutransformer.sharding.processes import launch


def main(config):
    import jax
    import numpy as np

    from mutransformer.data.batches.pipeline import Batch
    from mutransformer.model.transformer import flops_per_token, specs
    from mutransformer.sharding.devices import memory_in_use, peak_flops
    from mutransformer.sharding.mesh import check_fits, data_share, make_mesh, put
    from mutransformer.training.state import init_state
    from mutransformer.training.step import make_train_step

    seconds, repeats = float(os.environ.get("BENCHMARK_SECONDS", "2")), int(os.environ.get("BENCHMARK_REPEATS", "5"))
    config = config.with_vocab(config.model.n_vocab or config.data.vocab_size)
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    n_blocks, blocks = data_share(mesh)
    rows = config.data.batch_size // n_blocks * len(blocks)
    tokens = np.random.default_rng(0).integers(0, config.model.n_vocab, (rows, config.data.seq_len), dtype=np.int32)
    segments = np.zeros_like(tokens) if config.data.intra_document_mask else None
    batch = put(Batch(tokens, np.ones_like(tokens, dtype=bool), segments), mesh)

    state = init_state(config, mesh)
    start = time.perf_counter()
    step = make_train_step(config, mesh, bos_id=0).lower(state, batch).compile()
    compiled = time.perf_counter() - start

    def run(n):
        nonlocal state
        start = time.perf_counter()
        for _ in range(n):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / n

    run(1)
    n = max(1, round(seconds / run(2)))
    times = [run(n) for _ in range(repeats)]
    rates = sorted(config.tokens_per_step / t for t in times)
    median = statistics.median(rates)
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    memory = memory_in_use(jax.local_devices())
    report = {
        "tokens_per_second": round(median),
        "range": [round(rates[0]), round(rates[-1])],
        "step_seconds": round(config.tokens_per_step / median, 5),
        "model_flops_per_second": round(median * flops_per_token(config)),
        "mfu": peak and round(median * flops_per_token(config) / (mesh.size * peak), 4),
        "compile_seconds": round(compiled, 2),
        "peak_bytes": memory and memory["peak_bytes"],
        "parameters": sum(w.size for w in jax.tree.leaves(specs(config))),
        "tokens_per_step": config.tokens_per_step,
        "steps_per_repeat": n,
        "repeats": repeats,
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": dict(mesh.shape),
        "compute": config.precision.compute,
        "jax": jax.__version__,
    }
    if jax.process_index() == 0:
        print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, __doc__ or ""))
