"""What training several learning rates at once gains over training them one after another."""

import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mutransformer.config.schema import Config
from mutransformer.data.batches.rows import Batch
from mutransformer.study.hardware.section import Result, Task
from mutransformer.study.hardware.sizes import SweepSize
from mutransformer.study.sweep.parallel_runs import ParallelRuns
from mutransformer.training.program import Vocabulary

GROWTH = 2.0  # how much longer than the size before it a size may take


def sweep_factor(task: Task, sizes: Sequence[SweepSize], n_rates: int, seconds: float, repeats: int) -> Iterator[Result]:
    """Times a step of one run alone on a device, and of n runs at once on all devices, as `mutransformer sweep` trains them.

    factor: n times the first over the second. seconds: of a repeat; the two take turns, and the medians count.
    """
    result: Result = {"rates": n_rates, "devices": jax.device_count(), "repeats": repeats, "sizes": [], "left_out": []}
    longest = 0.0
    for size in sizes:
        began = time.monotonic()
        if why := task.too_late_for(GROWTH * longest, f"the size before it took {longest:.0f} s"):
            result["left_out"].append(f"{size.name}: {why}")
        else:
            task.say(f"{size.name}: compiling one run, and {n_rates} at once")
            found = {"name": size.name, **factor(task.config(size.settings), n_rates, seconds, repeats)}
            result["sizes"].append(found)
            task.say(f"{size.name}: {n_rates} at once take {found['together_seconds'] / found['alone_seconds']:.2f} times one")
        longest = max(longest, time.monotonic() - began)
        yield result


def factor(config: Config, n_rates: int, seconds: float, repeats: int) -> Result:
    """The times of a step alone and together, in seconds: medians over repeats, and all of them."""
    rates = [2.0 ** -(4 + i) for i in range(n_rates)]
    together = rates + [rates[-1]] * (-n_rates % jax.device_count())  # a multiple of the devices, as in a sweep
    alone = Timed(config, rates[:1], jax.devices()[:1])
    at_once = Timed(config, together, jax.devices())
    steps = [each.steps_of(seconds) for each in (alone, at_once)]
    pairs = [(alone.seconds_per_step(steps[0]), at_once.seconds_per_step(steps[1])) for _ in range(repeats)]
    one, many = (float(np.median(times)) for times in zip(*pairs, strict=True))
    return {
        "factor": n_rates * one / many,
        "alone_seconds": one,
        "together_seconds": many,
        "alone_repeats": [a for a, _ in pairs],
        "together_repeats": [b for _, b in pairs],
        "compile_seconds": [alone.compile_seconds, at_once.compile_seconds],
        "vectorized": jax.devices()[0].platform != "cpu",
        "tokens_per_step": config.tokens_per_step,
    }


class Timed:
    """Runs of one config at some rates on some devices, on random tokens that are placed in every step, as in a sweep."""

    def __init__(self, config: Config, rates: Sequence[float], devices: Sequence[object]) -> None:
        vocabulary = Vocabulary(config.model.n_vocab or config.data.vocab_size)
        self.runs = ParallelRuns(config, vocabulary, [(rate, config.seed) for rate in rates], devices)
        shape = (config.data.batch_size, config.data.seq_len)
        tokens = np.random.default_rng(0).integers(0, vocabulary.n_vocab, shape, dtype=np.int32)
        self.batch = Batch(tokens, np.ones(shape, bool), np.zeros_like(tokens) if config.data.intra_document_mask else None)
        began = time.perf_counter()
        self.runs.compile()
        self.compile_seconds = time.perf_counter() - began
        self.state = self.runs.init()

    def seconds_per_step(self, n: int) -> float:
        """The time of n steps / n."""
        began = time.perf_counter()
        for _ in range(n):
            self.state, _ = self.runs.step(self.state, [self.batch])
        jax.block_until_ready(self.state)
        return (time.perf_counter() - began) / n

    def steps_of(self, seconds: float) -> int:
        """How many steps take about so many seconds, at least 1."""
        self.seconds_per_step(1)
        return max(1, round(seconds / self.seconds_per_step(2)))
