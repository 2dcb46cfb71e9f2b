"""Checks before the first step of what a run needs until its end, so that a fault is found before hours of training.

`check_before_data` needs nothing but the config; `check_before_training` the program and its data.
"""

import logging
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mutransformer.config.optim import OptimConfig
from mutransformer.config.schema import Config, flatten
from mutransformer.data.batches import pipeline
from mutransformer.data.cache.dataset import Corpus
from mutransformer.errors import ConfigError, check, first_line
from mutransformer.sharding.mesh import data_share
from mutransformer.sharding.processes import all_processes, assert_equal_across_processes
from mutransformer.training.optim import make_schedule
from mutransformer.training.program import Program
from mutransformer.training.run_folder import RunFolder, existing
from mutransformer.training.sinks import read_metrics

# What may differ between the hosts of a run: how they find each other, and where they keep copies of the same data.
OF_A_HOST = ("distributed.", "workdir", "compile_cache", "data.cache_dir", "data.local_dir", "data.files", "data.path")
LARGEST_FILE = 2 << 30  # bytes: Orbax's limit for a file of a checkpoint

_log = logging.getLogger(__name__)


def check_before_data(config: Config, folder: RunFolder) -> None:
    """Compares the settings of all processes, and checks that the run's folder can be written to and is in nobody's use.

    Leaves nothing on the disk. Raises ConfigError if not.
    """
    settings = {key: repr(value) for key, value in flatten(config).items() if not key.startswith(OF_A_HOST)}
    assert_equal_across_processes("the configuration", settings)
    with all_processes().first_in_process_0("the run's folder"):
        if jax.process_index() == 0:
            folder.check_free()


def check_before_training(program: Program, corpus: Corpus, folder: Path, start: int) -> None:
    """Checks that what the run will need at its evaluations, its checkpoints and its end is there.

    folder: where this machine keeps the run's files. start: updates completed.

    Raises ConfigError if the run is behind its latest checkpoint, the validation split gives no batch, or the disk has no room
    for the checkpoints.
    """
    config = program.config
    done = f"steps = {config.steps}: the run's latest checkpoint is of step {start}; set more steps, or another name=..."
    check(start <= config.steps, done)
    share, n_vocab = data_share(program.mesh), program.vocabulary.n_vocab
    next(iter(pipeline.eval_batches(corpus.splits["validation"], config.data, 1, *share, n_vocab)))
    with all_processes().first_in_process_0("the room for checkpoints"):
        if start < config.steps and jax.process_index() == 0:
            _check_room(program, folder)


def warn_of_another_schedule(program: Program, settings: dict[str, Any], step: int) -> None:
    """Warns if the learning rate jumps where a run goes on with other settings than its checkpoint's, such as more steps."""
    before = _rate(settings, step)
    now = program.config.optim.lr * float(program.optimizer.schedule(np.int32(step)))
    if before is not None and not math.isclose(before, now, rel_tol=0.02, abs_tol=1e-12):
        text = "the schedule differs from the checkpoint's: after step %d the learning rate is %.2g, before it was %.2g"
        _log.warning(text, step, now, before)


def _rate(settings: dict[str, Any], step: int) -> float | None:
    """The learning rate after a step by the settings of a checkpoint; None if they are of another version."""
    try:
        names = ("schedule", "warmup_steps", "warmup_fraction", "min_lr_ratio", "lr")
        optim = OptimConfig(**{name: settings[f"optim.{name}"] for name in names})
        return optim.lr * float(make_schedule(optim, settings["steps"])(np.int32(step)))
    except (KeyError, TypeError, ConfigError):
        return None


def final_result(folder: Path, step: int) -> float | None:
    """The loss of the final evaluation of a finished run of so many steps, from its metrics; None if it has none."""
    lines = read_metrics(folder)
    found = lines[-1].get("validation_whole/loss") if lines and lines[-1]["step"] == step else None
    return found if isinstance(found, float) and math.isfinite(found) else None


def _check_room(program: Program, folder: Path) -> None:
    """Raises ConfigError if the checkpoints that the run keeps, and one more while it is written, do not fit on the disk."""
    c, steps = program.config.checkpoint, program.config.steps
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(program.state))
    saves = 1 + (steps - 1) // c.every if c.every else 1
    copies = min(saves, c.keep + c.keep_best + 1)
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    a_checkpoint = f"a checkpoint takes {_megabytes(size)}"
    if largest != resource.RLIM_INFINITY:
        fits = min(size, LARGEST_FILE) <= largest
        check(fits, f"{folder}: {a_checkpoint}, but no file may be larger than {_megabytes(largest)} (ulimit -f)")
    try:
        there = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
        free = shutil.disk_usage(existing(folder)).free
    except OSError as error:
        _log.warning("%s: its free space is not known: %s", folder, first_line(error))
        return
    text = f"{folder}: {a_checkpoint}, and {copies} of them must fit, but only {_megabytes(free)} are free there"
    advice = "make room, choose another workdir, or lower checkpoint.keep or keep_best"
    check(copies * size <= free + there, f"{text}; {advice}")


def _megabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e10 else f"{n / 1e6:,.1f} MB"
