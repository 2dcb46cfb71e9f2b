"""The train step of a program, compiled and timed on random tokens that stay on the devices."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mutransformer.config.schema import Config
from mutransformer.data.batches.rows import Batch
from mutransformer.sharding.devices import memory_in_use, peak_flops
from mutransformer.sharding.mesh import data_share, put_batch
from mutransformer.training.layer_sizes import LayerSizes
from mutransformer.training.program import Program, Vocabulary, build
from mutransformer.training.step import make_train_step


def build_alone(config: Config) -> Program:
    """The program of a config on all devices, with a vocabulary but without a tokenizer. Raises ConfigError as `build` does."""
    return build(config, vocabulary=Vocabulary(config.model.n_vocab or config.data.vocab_size))


class StepTimer:
    """A compiled step with its state. `compile_seconds` is what compiling took, little if the program was kept on the disk."""

    def __init__(self, program: Program) -> None:
        config, mesh = program.config, program.mesh
        n_blocks, blocks = data_share(mesh)
        rows = config.data.batch_size // n_blocks * len(blocks)
        tokens = np.random.default_rng(0).integers(0, program.vocabulary.n_vocab, (rows, config.data.seq_len), dtype=np.int32)
        segments = np.zeros_like(tokens) if config.data.intra_document_mask else None
        self.program = program
        self.batch = put_batch(Batch(tokens, np.ones_like(tokens, dtype=bool), segments), mesh)
        self.state = program.init_state()
        began = time.perf_counter()
        self.compiled = make_train_step(program).lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - began

    def seconds_per_step(self, n: int, layers: LayerSizes | None = None, every: int = 1) -> float:
        """The time of n steps / n; with `layers`, every so many steps those are measured, and the sizes fetched."""
        began = time.perf_counter()
        for i in range(1, n + 1):
            measuring = layers if layers and i % every == 0 else None
            before = measuring and measuring.before(self.state, self.batch)
            self.state, metrics = self.compiled(self.state, self.batch)
            if measuring and before:
                measuring.layout.split(np.asarray(measuring.after(before, self.state, metrics)))
        jax.block_until_ready(self.state)
        return (time.perf_counter() - began) / n

    @property
    def text(self) -> str | None:
        """The scheduled program as XLA prints it; None if this version of the compiler cannot."""
        try:
            return self.compiled.as_text()
        except jax.errors.JaxRuntimeError:
            return None

    def steps_of(self, seconds: float) -> int:
        """How many steps take about so many seconds, at least 1. Runs three, of which the first is a warm-up."""
        self.seconds_per_step(1)
        return max(1, round(seconds / self.seconds_per_step(2)))


def figures(timer: StepTimer, seconds: Sequence[float]) -> dict[str, Any]:
    """What the seconds per step of several repeats say: the median over repeats, and the range of tokens per second."""
    program, config = timer.program, timer.program.config
    rates = sorted(config.tokens_per_step / each for each in seconds)
    median = statistics.median(rates)
    peak, memory = peak_flops(program.execution.device_kind), memory_in_use(jax.local_devices())
    return {
        "tokens_per_second": round(median),
        "range": [round(rates[0]), round(rates[-1])],
        "step_seconds": round(config.tokens_per_step / median, 5),
        "model_flops_per_second": round(median * program.flops_per_token),
        "mfu": peak and round(median * program.flops_per_token / (program.mesh.size * peak), 4),
        "compile_seconds": round(timer.compile_seconds, 2),
        "peak_bytes": memory and memory["peak_bytes"],
        "parameters": program.n_params,
        "tokens_per_step": config.tokens_per_step,
    }


def layer_overheads(timer: StepTimer, n: int, repeats: int, every: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds per step of repeats of n steps, a multiple of `every`, without log.layers; and what it costs, by repeats with and
    without in turn."""
    began = time.perf_counter()
    layers = LayerSizes(timer.program, timer.state, timer.batch)
    compile_seconds = time.perf_counter() - began
    timer.seconds_per_step(every, layers, every)
    pairs = [(timer.seconds_per_step(n), timer.seconds_per_step(n, layers, every)) for _ in range(repeats)]
    overheads = sorted(measured / without - 1 for without, measured in pairs)
    return [without for without, _ in pairs], {
        "layers_every": every,
        "layers_overhead": round(statistics.median(overheads), 4),
        "layers_overhead_range": [round(overheads[0], 4), round(overheads[-1], 4)],
        "layers_compile_seconds": round(compile_seconds, 2),
    }
