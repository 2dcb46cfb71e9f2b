"""The places that a run's scalars are written to: metrics.jsonl, TensorBoard, Weights & Biases.

metrics.jsonl is the record: when a run starts or resumes, it is cut to the steps that the state holds, and TensorBoard's events
are written from it anew. So no reader sees a step twice, and none is lost with a process that was killed.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # made at import
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import hparams, text

from mutransformer.config.load import to_yaml
from mutransformer.config.schema import Config, non_defaults
from mutransformer.errors import ConfigError, redact
from mutransformer.training.run_folder import RunFolder

FILE = "metrics.jsonl"


@runtime_checkable
class Sink(Protocol):
    """Where scalars go. Every method may raise: a run goes on without a sink that fails."""

    name: str  # for messages

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of a step, by tag, so that they outlive this process. step: updates completed, never falling."""
        ...

    def close(self, final: Mapping[str, float]) -> None:
        """Takes the final results of a finished run by tag, or nothing, and ends."""
        ...


class JsonLines:
    """metrics.jsonl: one line per step, steps ascending. Later values of the same step are added to its line."""

    def __init__(self, folder: RunFolder, start_step: int) -> None:
        """Drops what an earlier process wrote after start_step, the updates completed. Raises OSError."""
        path, self._folder = folder.path / FILE, folder
        self.name = f"{folder.name}/{FILE}"
        kept = [line + b"\n" for line in _complete_lines(path) if _step_of(line) <= start_step]
        folder.write(FILE, b"".join(kept))
        self._file = path.open("r+b")
        self._at = sum(map(len, kept[:-1]))  # where the last line starts
        self._line: dict[str, Any] = json.loads(kept[-1]) if kept else {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        legal = {tag: value if math.isfinite(value) else str(value) for tag, value in values.items()}
        if self._line.get("step") != step:
            self._at, self._line = self._file.seek(0, os.SEEK_END), {}
        self._line |= {"step": step, "time": time.time(), **legal}
        with self._folder.changing():
            self._file.seek(self._at)
            self._file.write(json.dumps(self._line).encode() + b"\n")
            self._file.truncate()
            self._file.flush()

    def close(self, final: Mapping[str, float]) -> None:
        self._file.close()


def read_metrics(folder: Path, last: int = sys.maxsize) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl up to a step, {"step": ..., tag: value, ...}, without damaged ones."""
    return [json.loads(line) for line in _complete_lines(folder / FILE) if _step_of(line) <= last]


def _complete_lines(path: Path) -> list[bytes]:
    """Without the half line that a killed process may leave."""
    return path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):  # what is damaged is dropped
        return math.inf


class EventFile:
    """A file of TensorBoard's events, written and flushed in the caller's thread.

    tensorboardX's own writer has a thread, which dies when the disk is full; its full queue then blocks the caller for ever.
    """

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        """Adds a file to the directory. Of earlier files TensorBoard forgets the steps from first_step on. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.time_ns() % 10**9}")
        self._writer.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, Any], when: float | None = None) -> None:
        """Adds numbers by tag. when: seconds since 1970; None: now."""
        summary = Summary(value=[Summary.Value(tag=board_tag(tag), simple_value=float(value)) for tag, value in values.items()])
        self.add(summary, step, when)

    def settings(self, config: Config, swept: Mapping[str, Any]) -> None:
        """Adds a row of the table of hyperparameters: the settings that are swept, and those that are not the defaults.

        The columns are left to TensorBoard, which puts those first that differ between the runs that it sees. Not by add_hparams,
        which would make a second TensorBoard run in a subfolder.
        """
        values = {**non_defaults(config), **swept}
        plain = {key: value for key, value in values.items() if isinstance(value, bool | int | float | str)}
        _, start, end = hparams(plain, {})
        for summary in (start, end):
            self.add(summary, 0)

    def add(self, summary: Summary, step: int, when: float | None = None) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time() if when is None else when, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def board_tag(tag: str) -> str:
    """A tag as TensorBoard shows it: the losses first, since it sorts groups by name."""
    group, _, name = tag.rpartition("/")
    return f"loss/{group}" if group and name == "loss" else tag


class TensorBoard:
    """The scalars, the config and the hyperparameters of a run in TensorBoard."""

    def __init__(self, config: Config, folder: RunFolder, start_step: int) -> None:
        """Replaces the events of earlier processes by those of metrics.jsonl up to start_step. Raises OSError."""
        self.name = f"{folder.name}/events.out.tfevents.*"
        old = list(folder.path.glob("events.out.tfevents.*"))
        self._config, self._events = config, EventFile(folder.path)
        self._events.add(text("config", f"```yaml\n{to_yaml(config)}```"), 0)
        for line in read_metrics(folder.path, start_step):  # numbers that are not finite are text there, which float reads
            values = {tag: value for tag, value in line.items() if tag not in ("step", "time")}
            self._events.scalars(line["step"], values, line.get("time"))
        self._events.flush()
        for path in old:
            path.unlink(missing_ok=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._events.scalars(step, values)
        self._events.flush()

    def close(self, final: Mapping[str, float]) -> None:
        if final:
            self._events.settings(self._config, {})
        self._events.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project, which a resumed run continues."""

    name = "Weights & Biases"

    def __init__(self, config: Config, folder: RunFolder, start_step: int) -> None:
        """Raises ConfigError if the package is missing."""
        try:
            wandb = import_module("wandb")
        except ModuleNotFoundError:
            raise ConfigError(f"log.wandb = {config.log.wandb}: needs a package: pip install 'mutransformer[wandb]'") from None
        kept = folder.path / "wandb-id"
        if start_step == 0 or not kept.exists():
            folder.write(kept.name, os.urandom(8).hex().encode())
        run_id, directory = kept.read_text(), str(folder.path)
        self._run = wandb.init(
            project=config.log.wandb, name=config.name, id=run_id, resume="allow", dir=directory, config=redact(asdict(config))
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, final: Mapping[str, float]) -> None:
        self._run.summary.update(dict(final))
        self._run.finish(exit_code=int(not final))  # no results: the run did not finish
