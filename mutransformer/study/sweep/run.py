"""Trains every (learning rate, seed) of every width, as many at once as fit, and leaves a line a run in runs.jsonl.

Cut off anywhere, the same command goes on: ended runs are in the file, those under way in a snapshot beside it.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Optional

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from mutransformer.config.schema import Config
from mutransformer.data.batches import pipeline
from mutransformer.data.cache.dataset import Corpus
from mutransformer.data.cache.prepare import prepare
from mutransformer.errors import FINISHED, STOPPED, check
from mutransformer.sharding.devices import memory_limit
from mutransformer.sharding.processes import StopRequest, all_processes, stop_on_signals
from mutransformer.study.sweep import records
from mutransformer.study.sweep.grid import Job, changed
from mutransformer.study.sweep.parallel_runs import Fleet, Sharded
from mutransformer.study.sweep.storage import Board, Point, Snapshots

SNAPSHOT_SECONDS = 300.0  # between snapshots of runs under way
OWN = {"optim.lr", "seed", "name", "workdir", "model.n_vocab"}  # what may differ between the runs of a job

_log = logging.getLogger(__name__)


def sweep(jobs: Sequence[Job], points: Sequence[Point], folder: Path, memory: Optional[int] = None) -> int:
    """Trains each job at each point, but for what the folder's file already has.

    Args:
        jobs: in the order in which they are trained.
        points: learning rates and seeds.
        folder: for runs.jsonl, TensorBoard, snapshots.
        memory: bytes that runs may take on a device; None: what the device has.

    Returns:
        The exit code: FINISHED, or STOPPED by a signal, with all saved.

    Raises:
        ConfigError: the folder holds runs of other settings, or a setting does not fit the data or the devices.
    """
    path = folder / records.FILE
    folder.mkdir(parents=True, exist_ok=True)  # now, not when there are runs to lose
    if jax.process_index() == 0 and records.mend(path):
        _log.warning("%s: the last line was cut short; its run is trained again", path)
    before = records.read(path) if path.exists() and path.stat().st_size else []
    todo = [(job, missing) for job in jobs if (missing := _missing(job, points, before, path))]
    n_todo = sum(len(missing) for _, missing in todo)
    _log.info("%d runs to train, %d are there; results: %s", n_todo, len(jobs) * len(points) - n_todo, path)
    with stop_on_signals() as stop:
        for job, missing in todo:
            corpus = prepare(job.config.data, all_processes())
            job = Job(job.variant, job.config.with_vocab(corpus.tokenizer.n_vocab))
            for fleet, together in _groups(job.config, corpus, missing, memory):
                runs = _train(job, fleet, together, corpus, folder, stop)
                if runs is None:
                    _log.info("stopped, all is saved; the same command goes on from there")
                    return STOPPED
                if jax.process_index() == 0:
                    records.append(path, runs)
                best = min(runs, key=lambda run: run.loss)
                diverged = sum(run.status == "diverged" for run in runs)
                _log.info(
                    "%s width %d: best validation loss %.4f at lr %s; %d of %d diverged",
                    *(job.variant, job.width, best.loss, octaves(best.lr), diverged, len(runs)),
                )
    return FINISHED


def octaves(lr: float) -> str:
    """A learning rate as a power of two, as figures have it."""
    return f"2^{math.log2(lr):g}"


def _missing(job: Job, points: Sequence[Point], before: Sequence[records.Run], path: Path) -> list[Point]:
    """The points of a job that the file does not have yet. Raises ConfigError if its runs had other settings."""
    ours = {key: value for key, value in changed(job.config).items() if key not in OWN}
    done = set()
    for run in before:
        if (run.variant, run.width) == (job.variant, job.width):
            theirs = {key: value for key, value in run.settings.items() if key not in OWN}
            differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            check(
                not differing,
                f"{path}: its runs of {run.variant} at width {run.width} had other settings: {', '.join(differing)}; "
                "choose another --out or --label",
            )
            done.add((run.lr, run.seed))
    return [point for point in points if point not in done]


def _groups(
    config: Config, corpus: Corpus, points: Sequence[Point], memory: Optional[int]
) -> Iterator[tuple[Fleet | Sharded, list[Point]]]:
    """The points in groups that the devices can train at once: all if they fit, else halves of that, else one by one.

    A group is filled up to a multiple of the devices by repeating its last point.
    """
    n, bos = len(jax.devices()), corpus.tokenizer.bos_id
    limit = memory_limit(jax.local_devices()[0], jax.local_device_count()) if memory is None else memory
    per_device = -(-len(points) // n)
    while per_device:
        size = n * per_device
        filled = [*points, *[points[-1]] * (-len(points) % size)]
        fleets = [Fleet(config, bos, filled[at : at + size]) for at in range(0, len(points), size)]
        need = fleets[0].compile()
        if need <= limit:
            for at, fleet in enumerate(fleets):
                yield fleet, list(points[at * size : (at + 1) * size])
            return
        _log.info("%d runs a device need %.1f GB, here are %.1f GB", per_device, need / 1e9, limit / 1e9)
        per_device //= 2
    for point in points:
        yield Sharded(config, bos, point), [point]


def _train(
    job: Job, fleet: Fleet | Sharded, points: list[Point], corpus: Corpus, folder: Path, stop: StopRequest
) -> list[records.Run] | None:
    """Trains a group; None if asked to stop."""
    config, began = job.config, time.perf_counter()
    text, held_out, n_vocab = corpus.splits["train"], corpus.splits["validation"], corpus.tokenizer.n_vocab
    every, steps = config.log.every, config.steps
    stacked = [leaf.shape for leaf in jax.tree.leaves(fleet.shapes)]  # for another number of devices otherwise
    identity = [job.variant, changed(config), points, pipeline.fingerprint(text, config.data, 0), stacked]
    snapshots = Snapshots(folder, identity)
    step = snapshots.newest() or 0
    losses = np.full((steps, len(points)), np.nan, np.float32)
    if step:
        state, kept = snapshots.restore(step, (fleet.shapes, losses))
        losses = np.array(kept)
    else:
        state = fleet.init()
    with ExitStack() as stack:
        board = stack.enter_context(closing(Board(folder, job, points, step)))
        share = fleet.data_share
        sources = [pipeline.train_batches(text, config.data, seed, *share, n_vocab) for seed in fleet.seeds]
        for source in sources:
            stack.enter_context(closing(source))
            source.set_state({"next_index": step})
        where = f"{len(points)} at once" if isinstance(fleet, Fleet) else "one, sharded"
        started = f", goes on after step {step}" if step else ""
        _log.info("%s width %d: %s, on %d devices%s", job.variant, job.width, where, len(jax.devices()), started)
        read, unread, saved, first = step, list[Array](), time.perf_counter(), (step, time.perf_counter())
        while step < steps:
            state, loss = fleet.step(state, [next(source) for source in sources])
            unread.append(loss)
            step += 1
            stopping = stop.requested  # looked at once: what is asked for from here on waits for the next step
            if step % every and step != steps and not stopping:
                continue
            losses[read:step] = fleet.read(unread)[:, : len(points)]
            board.write(step, losses[read:step])
            if read == 0 or step * 4 // steps > read * 4 // steps:
                _log.info("%s", _progress(job, step, losses[read:step], points, first))
            if read == first[0]:
                first = step, time.perf_counter()  # compiling does not count
            read, unread = step, []
            if stopping or time.perf_counter() - saved > SNAPSHOT_SECONDS:
                snapshots.save(step, (state, losses))
                saved = time.perf_counter()
            if stopping:
                return None
        batches = pipeline.eval_batches(held_out, config.data, config.eval.batches, *share, n_vocab)
        validation = fleet.evaluate(state, list(batches))
        seconds = (time.perf_counter() - began) / len(points)
        runs = [_record(job, p, losses[:, i], float(validation[i]), seconds) for i, p in enumerate(points)]
        board.finish(runs)
    snapshots.drop()
    return runs


def _progress(job: Job, step: int, losses: Float[np.ndarray, "n R"], points: Sequence[Point], first: tuple[int, float]) -> str:
    """A line on how it goes: the best run by the losses just read, and the speed since `first`, (step, time)."""
    means = losses.mean(axis=0)
    steps = job.config.steps
    text = f"{job.variant} width {job.width}: step {step}/{steps}"
    if np.isfinite(means).any():
        best = int(np.nanargmin(np.where(np.isfinite(means), means, np.nan)))
        text += f"  best loss {means[best]:.4f} at lr {octaves(points[best][0])}"
    if step > first[0] and first[0]:
        seconds = (time.perf_counter() - first[1]) / (step - first[0])
        tokens = len(points) * job.config.tokens_per_step / seconds
        text += f"  {tokens / 1000:,.1f}k tok/s over all runs  eta {seconds * (steps - step):.0f} s"
    return text


def _record(job: Job, point: Point, losses: Float[np.ndarray, " steps"], validation: float, seconds: float) -> records.Run:
    steps, every = job.config.steps, job.config.log.every
    logged = [*range(every, steps, every), steps]
    means = [float(np.mean(losses[a:b], dtype=np.float64)) for a, b in zip([0, *logged], logged, strict=False)]
    wrong = np.flatnonzero(~np.isfinite(losses))
    return records.Run(
        variant=job.variant,
        width=job.width,
        lr=point[0],
        seed=point[1],
        status="diverged" if wrong.size or not math.isfinite(validation) else "finished",
        steps=steps,
        diverged_at=int(wrong[0]) + 1 if wrong.size else None,
        logged=logged,
        train_loss=[round(mean, 6) if math.isfinite(mean) else None for mean in means],
        validation_loss=round(validation, 6) if math.isfinite(validation) else None,
        seconds=round(seconds, 2),
        settings=changed(job.config),
    )
