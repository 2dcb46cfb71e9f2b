"""The coordinate check: how large activations are, and how far training moves them and the weights, at every width or depth.

In a parametrization that transfers, mean |x| of every activation, and of its change since the start, is independent of width
after a few steps (Yang et al., arXiv 2203.03466, appendix D.1; depth: Dey et al., arXiv 2505.01618). An update of a hidden or
output weight is smaller by the factor by which its fan-in is larger. Reported as CSV, figures, TensorBoard files, a table of
slopes, and verdicts.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tensorboardX import SummaryWriter

from mutransformer.config.schema import Config
from mutransformer.data.batches import pipeline
from mutransformer.data.cache.dataset import Corpus
from mutransformer.model.ops import shift_right
from mutransformer.model.transformer import Intermediates
from mutransformer.model.weights import Transformer
from mutransformer.mup.checks.slopes import (
    KINDS,
    UPDATES,
    Axis,
    Coordinate,
    Expected,
    Kind,
    SlopeFit,
    csv_text,
    fit_slopes,
    judge,
    slope_table,
)
from mutransformer.mup.checks.verdict import Verdict
from mutransformer.mup.roles import path_of
from mutransformer.sharding.collectives import mean_xy
from mutransformer.sharding.spec import Weight
from mutransformer.study.sweep.grid import VariantConfig
from mutransformer.study.sweep.parallel_runs import RUNS, ParallelRuns
from mutransformer.training.optim import Optimizer
from mutransformer.training.program import TrainState, prepare_data

TABLE = "coordinates.csv"
# Muon's updates have singular values of one size: entries of M^-1/2 if there are M of them, and of 1 / M if there are as many at
# each width, as where a batch has fewer tokens than the model has features. Expected is the middle.
MUON = -0.75
MULTIPLIED = ("mup_table8", "completep")  # their output weight is constant, and its products are multiplied by P / M
Configs = Sequence[VariantConfig]  # one for each width or depth

_log = logging.getLogger(__name__)


def coordinate_check(
    subject: Configs, control: Configs, axis: Axis, seeds: Sequence[int], steps: int, max_slope: float, folder: Path
) -> list[Verdict]:
    """Measures every config of the checked parametrization and of one that should fail (empty: none), and judges the result.

    Writes coordinates.csv, figures as PNG and SVG, and TensorBoard files to the folder. Raises ConfigError if a setting does not
    fit the data or matplotlib is not installed.
    """
    from mutransformer.study import figures  # needs matplotlib, which is an extra

    folder.mkdir(parents=True, exist_ok=True)  # fails before measuring, not after
    found: list[Coordinate] = []
    expected: Expected | None = None  # of the subject, which comes first
    for variant in (*subject, *control):
        at = variant.config.model.d_model if axis == "width" else variant.config.model.n_layer
        coordinates, specs = measure(variant, at, seeds, steps, prepare_data(variant.config))
        expected = expected or expected_slopes(variant.config, specs)
        found += coordinates
        _log.info("measured %s at %s %d", variant.name, axis, at)
    assert expected is not None
    (folder / TABLE).write_text(csv_text(found), encoding="utf-8")
    fits = fit_slopes(found)
    name, control_name = subject[0].name, control[0].name if control else None
    images = {kind: folder / f"coordinates_{kind}.png" for kind in KINDS if any(fit.kind == kind for fit in fits)}
    for kind, path in images.items():
        figures.save(figures.coordinates, [fit for fit in fits if fit.kind == kind], name, control_name, axis, path=path)
    _write_tensorboard(fits, folder / "tensorboard", images)
    print(slope_table(fits, axis))
    return judge(fits, expected, name, control_name, axis, max_slope)


def expected_slopes(config: Config, specs: Transformer[Weight]) -> Expected:
    """The slopes of muP for a model, whatever its own rule is.

    The logits start as sums of M products of M^-1/2 that are independent, so they fall as M^-1/2 with muP's unembedding, unless
    model.unembed_init=sp, which keeps them.
    """
    optim, by_path = config.optim, _by_path(specs)
    update = {path: UPDATES.get(w.role, 0.0) for path, w in by_path.items()}
    update |= {path: 0.0 for path, w in by_path.items() if w.role == "output" and optim.rule in MULTIPLIED}
    if optim.name == "muon":
        update |= {path: MUON for path, w in by_path.items() if w.role in ("hidden", "residual")}
    vectors = frozenset(path for path, w in by_path.items() if not w.is_matrix)
    unembed_init = optim.rule if config.model.unembed_init == "rule" else config.model.unembed_init
    return Expected({} if unembed_init == "sp" else {"logits": -0.5}, update, vectors=vectors)


def measure(
    variant: VariantConfig, at: int, seeds: Sequence[int], steps: int, corpus: Corpus
) -> tuple[list[Coordinate], Transformer[Weight]]:
    """Trains on one batch, the same at every step, and measures the model before the first update and after each.

    `at` is the variant's width or depth, to be recorded. Each seed has its own weights and batch. Returns the numbers, and the
    specs of the weights.
    """
    config, n_vocab = variant.config, corpus.tokenizer.n_vocab
    filled = [*seeds, *[seeds[-1]] * (-len(seeds) % len(jax.devices()))]
    runs = ParallelRuns(config, corpus.tokenizer, [(config.optim.lr, seed) for seed in filled])
    batches = []
    for seed in runs.seeds:
        with closing(pipeline.train_batches(corpus.splits["train"], config.data, seed, 1, (0,), n_vocab)) as source:
            batches.append(next(source))
    placed = runs.place(batches)
    forward, bos_id = runs.program.forward, runs.program.bos_id

    def of_run(weights: Sequence[Transformer[Array]], batch: pipeline.Batch) -> tuple[Intermediates, Intermediates]:
        inputs = shift_right(batch.tokens, bos_id, batch.segments)
        start, now = (forward.intermediates(w, inputs, batch.segments) for w in weights)
        change = {name: now[name].astype(jnp.float32) - start[name].astype(jnp.float32) for name in now}
        return jax.tree.map(_mean_abs, now), jax.tree.map(_mean_abs, change)

    sizes_and_changes = jax.jit(runs.map(of_run, (runs.pspecs, runs.pspecs), RUNS))
    updates = jax.jit(partial(jax.tree.map, lambda a, b: jnp.mean(jnp.abs(b - a), axis=tuple(range(1, a.ndim)))))
    keep = jax.jit(partial(jax.tree.map, lambda w, share: w * (1 - share.reshape(-1, *[1] * (w.ndim - 1)))))
    decay = jax.jit(jax.vmap(partial(_decay, runs.program.optimizer)))
    state = runs.init()
    start: Any = jax.tree.map(jnp.copy, state.params)
    found: list[Coordinate] = []

    def record(step: int, kind: Kind, values: dict[str, Array]) -> None:
        for name, by_run in values.items():
            by_seed = zip(seeds, np.asarray(by_run).tolist(), strict=False)
            found.extend(Coordinate(variant.name, at, seed, step, kind, name, value) for seed, value in by_seed)

    for step in range(steps + 1):
        if step:
            before: Any = jax.tree.map(jnp.copy, state.params)
            if config.optim.weight_decay:
                # What decay removes is measured by itself. In the update it would hide the gradient's part.
                shares = decay(state)
                record(step, "decay", _by_path(shares))
                before = keep(before, shares)
            state, _ = runs.step(state, batches)
            record(step, "update", _by_path(updates(before, state.params)))
        size, change = sizes_and_changes((start, state.params), placed, runs.hyper.data)
        record(step, "size", size)
        if step:
            record(step, "change", change)
    return found, runs.program.specs


def _decay(optimizer: Optimizer, state: TrainState[Array]) -> Transformer[Array]:
    """The share of each weight that decay removes in the next update: how the update depends on the weights themselves."""
    zeros, ones = (jax.tree.map(like, state.params) for like in (jnp.zeros_like, jnp.ones_like))
    update = optimizer.transformation().update
    of_zeros, of_ones = (update(zeros, state.opt, weights)[0] for weights in (zeros, ones))
    return jax.tree.map(lambda a, b: jnp.mean(a - b), of_zeros, of_ones)


def _by_path(tree: Transformer[Any]) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _mean_abs(x: Array) -> Array:
    return mean_xy(jnp.mean(jnp.abs(x.astype(jnp.float32))))


def _write_tensorboard(fits: Sequence[SlopeFit], folder: Path, images: Mapping[str, Path]) -> None:
    """Curves over steps, means over seeds, one TensorBoard run for each variant and size; and the figures."""
    from PIL import Image  # a dependency of matplotlib

    for variant, at in dict.fromkeys((fit.variant, at) for fit in fits for at in fit.at):
        with SummaryWriter(str(folder / f"{variant} {at}")) as writer:
            for fit in (fit for fit in fits if fit.variant == variant):
                writer.add_scalar(f"{fit.kind}/{fit.name}", fit.means[fit.at.index(at)], fit.step)
    with SummaryWriter(str(folder / "figures")) as writer:
        for kind, path in images.items():
            writer.add_image(f"coordinates/{kind}", np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")
