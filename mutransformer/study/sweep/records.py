"""What a sweep leaves behind: one line of JSON a run, written when the run has ended, read by reports."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Optional

from mutransformer.errors import ConfigError, check

FILE = "runs.jsonl"  # in a sweep's folder


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
        variant: what varies beside width, learning rate and seed: the rule and the swept settings, "mup model.qk_scale=0.25".
        width: d_model.
        lr: the base learning rate, optim.lr.
        seed: of weights and data order.
        status: whether the loss stayed finite.
        steps: updates planned; a diverged run computes on, without meaning.
        diverged_at: the first step whose loss is not finite.
        logged: step numbers, ascending, up to steps.
        train_loss: nats a token, before the update; the mean over the steps since the logged step before. None: not finite.
        validation_loss: nats a token at the end. None: not finite.
        seconds: of the group of runs that were trained at once, divided by their number; compilation included.
        settings: dotted keys whose values are not the defaults.
    """

    variant: str
    width: int
    lr: float
    seed: int
    status: Literal["finished", "diverged"]
    steps: int
    diverged_at: Optional[int]
    logged: list[int]
    train_loss: list[Optional[float]]
    validation_loss: Optional[float]
    seconds: float
    settings: dict[str, Any]

    @property
    def key(self) -> tuple[str, int, float, int]:
        """What tells runs apart."""
        return self.variant, self.width, self.lr, self.seed

    @property
    def loss(self) -> float:
        """What learning rates are compared by: the validation loss, infinite if the run diverged."""
        return math.inf if self.validation_loss is None or self.status == "diverged" else self.validation_loss


def append(path: Path, runs: Iterable[Run]) -> None:
    """Adds lines, and returns when they are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(run), allow_nan=False) + "\n" for run in runs))
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path) -> bool:
    """Drops a last line that a killed process left half written. Returns whether there was one."""
    if not path.exists():
        return False
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole == text:
        return False
    new = path.with_suffix(".new")
    new.write_bytes(whole)
    os.replace(new, path)
    return True


def read(path: Path) -> list[Run]:
    """The runs in a file, or in the file that a sweep's folder holds.

    Raises:
        ConfigError: there is no such file, or no run in it; a line is cut short or is no run. Names file and line.
    """
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read it: {getattr(error, 'strerror', None) or error}") from None
    check(bool(lines), f"{path}: holds no runs")
    return [_parse(line, f"{path}:{at}", last=at == len(lines)) for at, line in enumerate(lines, start=1)]


def join(paths: Iterable[Path]) -> list[Run]:
    """The runs of several files or folders as one sweep, in the order of the files; a run that is there twice counts once.

    Raises:
        ConfigError: as read does; a run is there twice and its losses differ. Names the run and both files.
    """
    found: dict[tuple[str, int, float, int], tuple[Run, Path]] = {}
    for path in paths:
        for run in read(path):
            known, where = found.setdefault(run.key, (run, path))
            check(
                _outcome(known) == _outcome(run),
                f"{path}: {run.variant}, width {run.width}, lr {run.lr}, seed {run.seed} is there twice with different losses"
                + ("" if where == path else f"; the other is in {where}"),
            )
    return [run for run, _ in found.values()]


def _outcome(run: Run) -> dict[str, Any]:
    # The time a run took is no part of it: the same sweep, repeated, gives the same losses.
    return {**asdict(run), "seconds": 0.0, "settings": {}}


def _parse(line: str, where: str, last: bool) -> Run:
    try:
        given: Mapping[str, Any] = json.loads(line, parse_constant=_refuse)
    except ValueError as error:
        hint = "cut short; the same sweep, run again, mends it" if last else f"not JSON: {error}"
        raise ConfigError(f"{where}: {hint}") from None
    names = {field.name for field in fields(Run)}
    check(
        isinstance(given, dict) and given.keys() == names,
        f"{where}: not a run: needs exactly the keys {', '.join(sorted(names))}",
    )
    wrong = sorted(name for name in names if not _fits(name, given[name]))
    check(not wrong, f"{where}: not a run: not the kind of value that it needs: {', '.join(wrong)}")
    run = Run(**given)
    check(
        len(run.logged) == len(run.train_loss) and bool(run.logged),
        f"{where}: needs as many losses as logged steps, and at least one",
    )
    check(run.logged == sorted(set(run.logged)), f"{where}: logged: the steps must ascend")
    return run


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _fits(name: str, value: Any) -> bool:
    """Whether a field can have this value: files are edited by hand, and a text for a number would end in a traceback."""
    match name:
        case "variant":
            return isinstance(value, str)
        case "status":
            return value in ("finished", "diverged")
        case "settings":
            return isinstance(value, dict)
        case "width" | "steps":
            return _whole(value) and value > 0
        case "seed":
            return _whole(value)
        case "diverged_at":
            return value is None or _whole(value)
        case "logged":
            return isinstance(value, list) and all(map(_whole, value))
        case "lr":
            return _finite(value) and value > 0
        case "train_loss":
            return isinstance(value, list) and all(loss is None or _finite(loss) for loss in value)
        case "validation_loss":
            return value is None or _finite(value)
        case _:
            return _finite(value)


def _whole(value: Any) -> bool:
    return type(value) is int  # true and false are integers to Python


def _finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)  # 1e999 is read as infinity
