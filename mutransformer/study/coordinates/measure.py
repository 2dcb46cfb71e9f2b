"""The coordinate check: how large activations are, and how far training moves them, as a model grows.

In a parametrization that lets width grow, the mean |x| of every activation, and of its change since the start, neither grows nor
falls with width after a few steps (Yang et al., arXiv 2203.03466, appendix D.1; depth: Dey et al., arXiv 2505.01618).
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mutransformer.config.schema import Config
from mutransformer.data.batches import pipeline
from mutransformer.data.cache.dataset import Corpus
from mutransformer.model.ops import shift_right
from mutransformer.model.transformer import Activations, Forward, Transformer
from mutransformer.sharding.collectives import mean_xy
from mutransformer.study.sweep.grid import Job
from mutransformer.study.sweep.parallel_runs import RUNS, Fleet

Kind = Literal["size", "change", "update"]
Axis = Literal["width", "depth"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coordinate:
    """One number of the check.

    Attributes:
        variant: the parametrization.
        at: the width or depth.
        seed: of weights and batch.
        step: updates completed.
        kind: size: mean |x|, over layers too. change: mean |x - x at step 0| on the same batch. update: mean |w - w before|.
        name: of the activation (Forward.activations), or for an update of the weight.
        value: not finite if the run diverged.
    """

    variant: str
    at: int
    seed: int
    step: int
    kind: Kind
    name: str
    value: float


def measure(job: Job, at: int, seeds: Sequence[int], steps: int, corpus: Corpus) -> list[Coordinate]:
    """Trains on one batch, the same at every step, and looks at the model before the first update and after each.

    Args:
        job: the config, its vocabulary known, and what to call it.
        at: its width or depth, to be written down.
        seeds: each has weights and a batch of its own.
        steps: updates.
        corpus: where the batches come from.
    """
    config, bos, n_vocab = job.config, corpus.tokenizer.bos_id, corpus.tokenizer.n_vocab
    filled = [*seeds, *[seeds[-1]] * (-len(seeds) % len(jax.devices()))]
    fleet = Fleet(config, bos, [(config.optim.lr, seed) for seed in filled])
    batches = [_first_batch(config, corpus, seed, n_vocab) for seed in fleet.seeds]
    placed = fleet.place(batches)
    look = jax.jit(_watch(fleet, config, bos))
    moved = jax.jit(lambda before, after: jax.tree.map(_mean_abs_per_run, jax.tree.map(jnp.subtract, after, before)))
    state = fleet.init()
    start: Any = jax.tree.map(jnp.copy, state.params)
    found: list[Coordinate] = []

    def write(step: int, kind: Kind, values: dict[str, Array]) -> None:
        for name, runs in values.items():
            for seed, value in zip(seeds, np.asarray(runs), strict=False):
                found.append(Coordinate(job.variant, at, seed, step, kind, name, float(value)))

    for step in range(steps + 1):
        if step:
            before = jax.tree.map(jnp.copy, state.params)
            state, _ = fleet.step(state, batches)
            write(step, "update", _by_name(moved(before, state.params)))
        size, change = look((start, state.params), placed, fleet.hyper.data)
        write(step, "size", size)
        if step:
            write(step, "change", change)
    return found


def _first_batch(config: Config, corpus: Corpus, seed: int, n_vocab: int) -> pipeline.Batch:
    with closing(pipeline.train_batches(corpus.splits["train"], config.data, seed, 1, (0,), n_vocab)) as batches:
        return next(batches)


def _watch(fleet: Fleet, config: Config, bos_id: int) -> Callable[..., tuple[dict[str, Array], dict[str, Array]]]:
    """A function of ((weights at the start, weights now), batches, data) -> size and change of every activation, [R] each."""
    forward = Forward(config, watch=True)

    def look(weights: tuple[Transformer[Array], Transformer[Array]], batch: pipeline.Batch) -> tuple[Activations, Activations]:
        inputs = shift_right(batch.tokens, bos_id, batch.segments)
        start, now = (forward.activations(w, inputs, batch.segments) for w in weights)
        change = {name: now[name].astype(jnp.float32) - start[name].astype(jnp.float32) for name in now}
        return jax.tree.map(_mean_abs, now), jax.tree.map(_mean_abs, change)

    return fleet.map(look, (fleet.pspecs, fleet.pspecs), RUNS)


def _mean_abs(x: Array) -> Array:
    return mean_xy(jnp.mean(jnp.abs(x.astype(jnp.float32))))


def _mean_abs_per_run(x: Array) -> Array:
    return jnp.mean(jnp.abs(x), axis=tuple(range(1, x.ndim)))


def _by_name(tree: Any) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
