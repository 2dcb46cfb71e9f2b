"""Measures how large activations are, and how far training moves them and the weights, in models of one size.

In a parametrization that transfers, mean |x| of every activation, and of its change since the start, is independent of width
after a few steps (Yang et al., arXiv 2203.03466, appendix D.1; depth: Dey et al., arXiv 2505.01618).
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mutransformer.data.batches import pipeline
from mutransformer.data.cache.dataset import Corpus
from mutransformer.model.ops import shift_right
from mutransformer.model.transformer import Intermediates
from mutransformer.model.weights import Transformer
from mutransformer.sharding.collectives import mean_xy
from mutransformer.study.sweep.grid import VariantConfig
from mutransformer.study.sweep.parallel_runs import RUNS, ParallelRuns

# size: mean |x|, over layers too. change: mean |x - x at step 0| on the same batch. update: mean |w - w before| of a weight.
Kind = Literal["size", "change", "update"]


@dataclass(frozen=True)
class Coordinate:
    """One measured number."""

    variant: str  # the parametrization
    at: int  # the model's width or depth
    seed: int  # of weights and batch
    step: int  # updates completed
    kind: Kind
    name: str  # of the activation (Forward.intermediates) or, for an update, of the weight
    value: float  # not finite if the run diverged


def measure(variant: VariantConfig, at: int, seeds: Sequence[int], steps: int, corpus: Corpus) -> list[Coordinate]:
    """Trains on one batch, the same at every step, and measures the model before the first update and after each.

    `at` is the variant's width or depth, to be recorded. Each seed has its own weights and batch.
    """
    config, n_vocab = variant.config, corpus.tokenizer.n_vocab
    filled = [*seeds, *[seeds[-1]] * (-len(seeds) % len(jax.devices()))]
    runs = ParallelRuns(config, corpus.tokenizer, [(config.optim.lr, seed) for seed in filled])
    batches = []
    for seed in runs.seeds:
        with closing(pipeline.train_batches(corpus.splits["train"], config.data, seed, 1, (0,), n_vocab)) as source:
            batches.append(next(source))
    placed = runs.place(batches)
    sizes_and_changes = jax.jit(_sizes_and_changes(runs))
    updates = jax.jit(lambda before, after: jax.tree.map(_mean_abs_update, before, after))
    state = runs.init()
    start: Any = jax.tree.map(jnp.copy, state.params)
    found: list[Coordinate] = []

    def record(step: int, kind: Kind, values: dict[str, Array]) -> None:
        for name, by_run in values.items():
            by_seed = zip(seeds, np.asarray(by_run).tolist(), strict=False)
            found.extend(Coordinate(variant.name, at, seed, step, kind, name, value) for seed, value in by_seed)

    for step in range(steps + 1):
        if step:
            before = jax.tree.map(jnp.copy, state.params)
            state, _ = runs.step(state, batches)
            moved = jax.tree_util.tree_leaves_with_path(updates(before, state.params))
            record(step, "update", {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in moved})
        size, change = sizes_and_changes((start, state.params), placed, runs.hyper.data)
        record(step, "size", size)
        if step:
            record(step, "change", change)
    return found


def _sizes_and_changes(runs: ParallelRuns) -> Callable[..., tuple[dict[str, Array], dict[str, Array]]]:
    """A function of ((weights at the start, weights now), batches, data) -> size and change of every activation, [R] each."""
    forward, bos_id = runs.program.forward, runs.program.bos_id

    def of_run(
        weights: tuple[Transformer[Array], Transformer[Array]], batch: pipeline.Batch
    ) -> tuple[Intermediates, Intermediates]:
        inputs = shift_right(batch.tokens, bos_id, batch.segments)
        start, now = (forward.intermediates(w, inputs, batch.segments) for w in weights)
        change = {name: now[name].astype(jnp.float32) - start[name].astype(jnp.float32) for name in now}
        return jax.tree.map(_mean_abs, now), jax.tree.map(_mean_abs, change)

    return runs.map(of_run, (runs.pspecs, runs.pspecs), RUNS)


def _mean_abs(x: Array) -> Array:
    return mean_xy(jnp.mean(jnp.abs(x.astype(jnp.float32))))


def _mean_abs_update(before: Array, after: Array) -> Array:
    return jnp.mean(jnp.abs(after - before), axis=tuple(range(1, before.ndim)))
