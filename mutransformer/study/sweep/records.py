"""runs.jsonl, the result of a sweep: one line of JSON for each run, appended when it has ended and read by reports."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

from beartype.door import is_bearable

from mutransformer.config.schema import Config, flatten
from mutransformer.errors import ConfigError, check, translate_errors
from mutransformer.mup.checks.runs import Run, ScalingAxis
from mutransformer.study.sweep.grid import KEYS, SweepAxis

FILE = "runs.jsonl"  # in a sweep's folder
DEFAULTS = flatten(Config())
_WITHOUT_EFFECT_SECTIONS = ("checkpoint", "distributed", "profile", "watchdog")
_WITHOUT_EFFECT_KEYS = {
    "name",
    "workdir",
    "compile_cache",
    "data.cache_dir",
    "data.cache_is_shared",
    "data.local_dir",
    "data.tokenize_workers",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "eval.samples",
    "eval.prompts",
    "log.layers",
    "log.tensorboard",
    "log.wandb",
}
# Settings that change no loss of a run: where it is, how its data are read, and what watches it.
WITHOUT_EFFECT = _WITHOUT_EFFECT_KEYS | {key for key in DEFAULTS if key.partition(".")[0] in _WITHOUT_EFFECT_SECTIONS}

HINTS = get_type_hints(Run, include_extras=True)


def setting_of(run: Run, key: str) -> Any:
    """A setting of a run, recorded or the default."""
    return run.settings.get(key, DEFAULTS[key])


def _tokens(run: Run) -> int:
    return run.steps * setting_of(run, "data.batch_size") * setting_of(run, "data.seq_len")


_COUNT: dict[SweepAxis, Callable[[Run], int]] = {
    "width": lambda run: run.width,
    "depth": lambda run: setting_of(run, "model.n_layer"),
    "tokens": _tokens,
    "batch": lambda run: setting_of(run, "data.batch_size"),
}
AXES: dict[SweepAxis, ScalingAxis] = {
    name: ScalingAxis(name, size, frozenset(WITHOUT_EFFECT | {"optim.lr", "seed", KEYS[name]}), name == "width")
    for name, size in _COUNT.items()
}


def identity(run: Run) -> tuple[Any, ...]:
    """What tells a run from all others of a study: its key, depth, steps and batch size."""
    return *run.key, setting_of(run, "model.n_layer"), run.steps, setting_of(run, "data.batch_size")


def append(path: Path, runs: Iterable[Run]) -> None:
    """Appends lines; returns once they are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(run), allow_nan=False) + "\n" for run in runs))
        file.flush()
        os.fsync(file.fileno())


def repair(path: Path) -> bool:
    """Removes a truncated last line, which a killed process may leave. Returns whether there was one."""
    text = path.read_bytes() if path.exists() else b""
    complete = text[: text.rfind(b"\n") + 1]
    if complete != text:
        new = path.with_suffix(".new")
        new.write_bytes(complete)
        os.replace(new, path)
    return complete != text


def read(path: Path) -> list[Run]:
    """The runs of a file, or of the file in a sweep's folder.

    Raises ConfigError, with file and line, if the file is missing, unreadable or empty, or a line is truncated or invalid.
    """
    path = path / FILE if path.is_dir() else path
    with translate_errors(f"{path}: cannot read it", (OSError, UnicodeDecodeError)):
        lines = path.read_text(encoding="utf-8").splitlines()
    check(bool(lines), f"{path}: holds no runs")
    return [_parse(line, f"{path}:{at}", last=at == len(lines)) for at, line in enumerate(lines, start=1)]


def join(paths: Iterable[Path]) -> list[Run]:
    """The runs of several files or folders as one sweep, in the order of the files; a repeated run counts once.

    Raises ConfigError as `read` does, and if a repeated run has other losses, with the run and both files.
    """
    found: dict[tuple[Any, ...], tuple[Run, Path]] = {}
    for path in paths:
        for run in read(path):
            first, where = found.setdefault(identity(run), (run, path))
            same = replace(run, seconds=first.seconds, settings=first.settings) == first
            text = f"{path}: {run.variant}, width {run.width}, lr {run.lr}, seed {run.seed} is repeated with different losses"
            check(same, text if where == path else f"{text}; the other is in {where}")
    return [run for run, _ in found.values()]


def _parse(line: str, where: str, last: bool) -> Run:
    try:
        values = json.loads(line)
    except ValueError as error:
        what = "truncated line; re-run the sweep to repair it" if last else f"not JSON: {error}"
        raise ConfigError(f"{where}: {what}") from None
    keys = ", ".join(sorted(HINTS))
    check(isinstance(values, dict) and values.keys() == HINTS.keys(), f"{where}: not a run: needs exactly the keys {keys}")
    wrong = sorted(key for key, hint in HINTS.items() if not is_bearable(values[key], hint))
    check(not wrong, f"{where}: not a run: wrong type or out of range: {', '.join(wrong)}")
    run = Run(**values)
    n = len(run.logged)
    check(n == len(run.train_loss) > 0, f"{where}: logged and train_loss must have equal lengths, at least 1")
    check(run.logged == sorted(set(run.logged)), f"{where}: logged: the steps must ascend")
    return run
