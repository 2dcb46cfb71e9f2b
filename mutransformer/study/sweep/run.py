"""Trains every (learning rate, seed) of every config, as many runs at once as fit, and appends each to runs.jsonl.

An interrupted sweep resumes when the same command is run again: from runs.jsonl, and from a snapshot of the runs in progress.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jaxtyping import Float

from mutransformer.config.run import WatchdogConfig
from mutransformer.config.schema import Config, non_defaults
from mutransformer.data.batches import pipeline
from mutransformer.data.cache.dataset import Corpus
from mutransformer.errors import FINISHED, STOPPED, check, first_line
from mutransformer.model.execution import with_compute
from mutransformer.mup.checks.verdict import count
from mutransformer.sharding.devices import memory_limit
from mutransformer.sharding.peers import Watch
from mutransformer.sharding.stopping import StopRequest, stop_on_signals
from mutransformer.study.sweep import records
from mutransformer.study.sweep.grid import Point, VariantConfig
from mutransformer.study.sweep.parallel_runs import ParallelRuns, RunGroup, ShardedRun, mean_losses
from mutransformer.study.sweep.records import AXES, WITHOUT_EFFECT
from mutransformer.training.program import prepare_data
from mutransformer.training.run_folder import RunFolder, owned_by_all
from mutransformer.training.sinks import EventFile

SNAPSHOT_SECONDS = 300.0  # between snapshots of runs in progress
PER_RUN = WITHOUT_EFFECT | {"optim.lr", "seed", "model.n_vocab"}  # settings that may differ between the runs of a config

_log = logging.getLogger(__name__)


def sweep(variants: Sequence[VariantConfig], points: Sequence[Point], folder: Path, memory: int | None = None) -> int:
    """Trains each config at each point, except those already in the folder's runs.jsonl.

    The folder also gets TensorBoard files and snapshots. `memory` is the bytes that runs may use on a device; None: what it has.
    Returns the exit code: FINISHED, or STOPPED after a signal, with all progress saved. Raises ConfigError if another sweep has
    the folder, it holds runs with other settings, or a setting does not fit the data or the devices.
    """
    owned = RunFolder(folder, chosen_by="--out")
    with owned_by_all(owned):
        return _sweep(variants, points, owned, memory)


def _sweep(variants: Sequence[VariantConfig], points: Sequence[Point], owned: RunFolder, memory: int | None) -> int:
    folder, path = owned.path, owned.path / records.FILE
    writes = jax.process_index() == 0
    if writes and records.repair(path):
        _log.warning("%s: removed a truncated last line; its run is trained again", path)
    done = records.read(path) if path.exists() and path.stat().st_size else []
    variants = [replace(one, config=with_compute(one.config, jax.local_devices()[0])) for one in variants]  # on record
    missing = [_missing(variant, points, done, path) for variant in variants]
    n_missing = sum(map(len, missing))
    _log.info("%s to train, %d already in %s", count(n_missing, "run"), len(variants) * len(points) - n_missing, path)
    with stop_on_signals() as stop, Watch(WatchdogConfig(), folder).running() as watch:
        if jax.process_count() > 1:
            stop.agree = watch.agree
        corpora = [_prepare(variant.config) if todo else None for variant, todo in zip(variants, missing, strict=True)]
        for variant, todo, corpus in zip(variants, missing, corpora, strict=True):
            if corpus is None:
                continue
            variant = replace(variant, config=variant.config.with_vocab(corpus.tokenizer.n_vocab))
            watch.starting(f"compiling {variant.name} {variant.where}")
            for group, together in _groups(variant.config, corpus, todo, memory):
                runs = _train(variant, group, together, corpus, folder, stop, watch)
                if runs is None:
                    _log.info("stopped; progress is saved. Re-run the same command to resume.")
                    return STOPPED
                if writes:
                    owned.check_present()
                    records.append(path, runs)
                best = min(runs, key=lambda run: run.loss)
                diverged = sum(run.status == "diverged" for run in runs)
                text = "%s %s: best validation loss %.4f at lr 2^%g; %d of %d diverged"
                _log.info(text, variant.name, variant.where, best.loss, math.log2(best.lr), diverged, len(runs))
    return FINISHED


def _prepare(config: Config) -> Corpus:
    """The data of a config. Raises ConfigError if they give no batch to train on or to score: before any group is trained."""
    corpus = prepare_data(config)
    n_vocab = config.with_vocab(corpus.tokenizer.n_vocab).model.n_vocab or 0
    pipeline.train_batches(corpus.splits["train"], config.data, config.seed, 1, (0,), n_vocab).close()
    next(iter(pipeline.eval_batches(corpus.splits["validation"], config.data, 1, 1, (0,), n_vocab)))
    return corpus


def _missing(variant: VariantConfig, points: Sequence[Point], done: Sequence[records.Run], path: Path) -> list[Point]:
    """The points of a config that are not done. Raises ConfigError if its runs in the file had other settings."""
    runs = [run for run in done if run.variant == variant.name and _size(run, variant) == variant.size]
    ours = non_defaults(variant.config)
    for run in runs:
        keys = (ours.keys() | run.settings.keys()) - PER_RUN
        differing = sorted(key for key in keys if ours.get(key) != run.settings.get(key))
        text = f"{path}: its runs of {run.variant} at {variant.where} had other settings: {', '.join(differing)}"
        check(not differing, f"{text}; choose another --out or --label")
    return [point for point in points if point not in {(run.lr, run.seed) for run in runs}]


def _size(run: records.Run, variant: VariantConfig) -> int:
    """Of a recorded run, what VariantConfig.size is of a config."""
    return run.steps if variant.axis == "tokens" else AXES[variant.axis].size(run)


def _groups(config: Config, corpus: Corpus, points: list[Point], memory: int | None) -> Iterator[tuple[RunGroup, list[Point]]]:
    """The points in groups that the devices can train at once: all if they fit, else half as many, and at last one by one.

    A group is filled up to a multiple of the number of devices by repeating the last point.
    """
    n = len(jax.devices())
    limit = memory_limit(jax.local_devices()[0], jax.local_device_count()) if memory is None else memory
    per_device = -(-len(points) // n)
    while per_device:
        size = n * per_device
        filled = [*points, *[points[-1]] * (-len(points) % size)]
        groups = [ParallelRuns(config, corpus.tokenizer, filled[at : at + size]) for at in range(0, len(points), size)]
        need = groups[0].compile()
        if need <= limit:
            for at, group in enumerate(groups):
                yield group, points[at * size : (at + 1) * size]
            return
        _log.info("%s per device would take %.1f GB of %.1f GB", count(per_device, "run"), need / 1e9, limit / 1e9)
        per_device //= 2
    for point in points:
        yield ShardedRun(config, corpus.tokenizer, point), [point]


def _train(
    variant: VariantConfig, group: RunGroup, points: list[Point], corpus: Corpus, folder: Path, stop: StopRequest, watch: Watch
) -> list[records.Run] | None:
    """Trains a group; None if a stop was requested."""
    config, began = variant.config, time.perf_counter()
    train_split, n_vocab, share = corpus.splits["train"], corpus.tokenizer.n_vocab, group.data_share
    losses = np.full((config.steps, len(points)), np.nan, np.float32)
    # Shapes depend on the number of devices, and names on the version.
    shapes = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(group.shapes)]
    identity = [variant.name, non_defaults(config), points, pipeline.fingerprint(train_split, config.data, 0), shapes]
    with ExitStack() as stack:
        snapshots = stack.enter_context(closing(_snapshots(folder, identity)))
        step, restored = _latest_snapshot(snapshots, (group.shapes, losses))
        state, losses = (restored[0], np.array(restored[1])) if restored else (group.init(), losses)
        curves = _Curves()
        stack.callback(lambda: curves.close())
        if config.log.tensorboard and jax.process_index() == 0:
            names = [
                f"{variant.name} {variant.where.replace(' ', '=')} lr=2^{math.log2(lr):g} seed={seed}" for lr, seed in points
            ]
            # What an interrupted process wrote beyond this step is dropped.
            curves = _Curves([folder / "tensorboard" / name.replace("/", "_") for name in names], step + 1)
        sources = [pipeline.train_batches(train_split, config.data, seed, *share, n_vocab) for seed in group.seeds]
        batches = pipeline.eval_batches(corpus.splits["validation"], config.data, config.eval.batches, *share, n_vocab)
        for source in sources:
            stack.enter_context(closing(source)).set_state({"next_index": step})
        where = f"{count(len(points), 'run')} {group.layout} on {count(len(jax.devices()), 'device')}"
        _log.info("%s %s: %s%s", variant.name, variant.where, where, f", resuming after step {step}" if step else "")
        unread, saved = list[Array](), time.perf_counter()
        first: tuple[int, float] | None = None  # the first logged step and its time: leaves out compilation
        while step < config.steps:
            watch.step_begins()
            watch.doing(f"training step {step + 1} of {variant.name} {variant.where}")
            state, loss = group.step(state, [next(source) for source in sources])
            unread.append(loss)
            step += 1
            stopping = stop.poll()  # read once: a request from here on takes effect after the next step
            if step % config.log.every and step != config.steps and not stopping:
                continue
            before, latest = step - len(unread), group.read(unread)[:, : len(points)]
            losses[before:step], unread = latest, []
            curves.write(step, latest.mean(axis=0).tolist())
            if first is None or step * 4 // config.steps > before * 4 // config.steps:
                _log.info("%s", _progress(variant, points, step, latest, first))
            first = first or (step, time.perf_counter())
            if stopping or time.perf_counter() - saved > SNAPSHOT_SECONDS:
                snapshots.save(step, args=ocp.args.StandardSave((state, losses)))
                snapshots.wait_until_finished()
                saved = time.perf_counter()
            if stopping:
                return None
        watch.starting(f"evaluating {variant.name} {variant.where}")
        validation = mean_losses(group, state, list(batches))
        seconds = (time.perf_counter() - began) / len(points)
        how = {"every": config.log.every, "seconds": round(seconds, 2), "settings": non_defaults(config)}
        numbers = zip(points, losses[:, : len(points)].T, validation.tolist(), strict=False)
        runs = [records.Run.of(variant.name, variant.width, *point, of, last, **how) for point, of, last in numbers]
        curves.finish(config, runs)
    if jax.process_index() == 0:
        shutil.rmtree(snapshots.directory, ignore_errors=True)
    return runs


class _Curves:
    """The training losses of runs in TensorBoard, a folder each. A sweep goes on without them if they cannot be written."""

    def __init__(self, folders: Sequence[Path] = (), first_step: int = 0) -> None:
        self._files = list[EventFile]()
        with self._given_up_if_it_fails():
            for folder in folders:
                self._files.append(EventFile(folder, first_step))

    def write(self, step: int, losses: Sequence[float]) -> None:
        with self._given_up_if_it_fails():
            for file, loss in zip(self._files, losses, strict=False):
                file.scalars(step, {"train/loss": loss})
                file.flush()

    def finish(self, config: Config, runs: Sequence[records.Run]) -> None:
        """Adds the validation losses, with the table of hyperparameters."""
        with self._given_up_if_it_fails():
            for file, run in zip(self._files, runs, strict=False):
                if run.validation_loss is not None:
                    file.scalars(run.steps, {"validation/loss": run.validation_loss})
                    swept = {"variant": run.variant, "model.d_model": config.model.d_model, "optim.lr": run.lr, "seed": run.seed}
                    file.settings(config, swept)

    def close(self) -> None:
        files, self._files = self._files, []
        with self._given_up_if_it_fails():
            for file in files:
                file.close()

    @contextmanager
    def _given_up_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning("TensorBoard's events cannot be written: %s; the sweep goes on without", first_line(error))
            self._files = []


def _snapshots(folder: Path, identity: Any) -> ocp.CheckpointManager:
    """The latest snapshot of the runs that this plain data identifies; others are not seen. Orbax writes each atomically."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    return ocp.CheckpointManager((folder / "snapshots" / name).absolute(), options=options)


def _latest_snapshot(snapshots: ocp.CheckpointManager, shapes: Any) -> tuple[int, Any]:
    """The step and the arrays of the latest snapshot; 0 and None if there is none, or, with a warning, if it cannot be read."""
    step = snapshots.latest_step() or 0
    if not step:
        return 0, None
    try:
        return step, snapshots.restore(step, args=ocp.args.StandardRestore(shapes))
    except (OSError, ValueError, KeyError) as error:
        _log.warning("%s: cannot be read, so its runs start again: %s", snapshots.directory / str(step), first_line(error))
        snapshots.delete(step)
        return 0, None


def _progress(
    variant: VariantConfig, points: Sequence[Point], step: int, losses: Float[np.ndarray, "n R"], since: tuple[int, float] | None
) -> str:
    """The run with the lowest mean loss over the last n steps, and the speed since an earlier (step, time)."""
    config, means = variant.config, np.where(np.isfinite(losses).all(axis=0), losses.mean(axis=0), np.inf)
    text, best = f"{variant.name} {variant.where}: step {step}/{config.steps}", int(np.argmin(means))
    if np.isfinite(means[best]):
        text += f"  best loss {means[best]:.4f} at lr 2^{math.log2(points[best][0]):g}"
    if since is not None:
        seconds = (time.perf_counter() - since[1]) / (step - since[0])
        text += f"  {len(points) * config.tokens_per_step / seconds / 1000:,.1f}k tok/s over all runs"
        text += f"  eta {seconds * (config.steps - step):.0f} s"
    return text
