"""The places that a run's numbers and texts are written to: files of JSON lines, TensorBoard, Weights & Biases.

metrics.jsonl, layers.jsonl and samples.jsonl are the record: when a run starts or resumes, they are cut to the steps that the
state holds, and TensorBoard's events are written from them anew. So no reader sees a step twice, and none is lost with a process
that was killed.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # made at import
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import hparams, text

from mutransformer.config.load import to_yaml
from mutransformer.config.schema import Config, non_defaults
from mutransformer.errors import ConfigError, redact
from mutransformer.training.layer_sizes import Sizes
from mutransformer.training.run_folder import RunFolder

FILE = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # with eval.samples: the texts of evaluations
LAYERS = "layers.jsonl"  # with log.layers: the sizes of training.layer_sizes


class Sample(NamedTuple):
    """A text that was sampled."""

    prompt: str
    text: str  # that continues it


@runtime_checkable
class Sink(Protocol):
    """Where numbers and texts go. Every method may raise: a run goes on without a sink that fails."""

    name: str  # for messages

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of a step, by tag, so that they outlive this process. step: updates completed, never falling."""
        ...

    def layers(self, step: int, sizes: Sizes) -> None:
        """Takes the sizes of the layers around the update that completed a step."""
        ...

    def texts(self, step: int, samples: Sequence[Sample]) -> None:
        """Takes the texts that were sampled at a step."""
        ...

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Takes an image that replaces earlier ones of its tag."""
        ...

    def close(self, final: Mapping[str, float]) -> None:
        """Takes the final results of a finished run by tag, or nothing, and ends."""
        ...


class JsonLines:
    """metrics.jsonl, layers.jsonl and samples.jsonl, the latter two if there is something to write; and images as files."""

    def __init__(self, folder: RunFolder, start_step: int) -> None:
        """Drops what an earlier process wrote after start_step, the updates completed. Raises OSError."""
        self.name, self._folder = f"{folder.name}/{FILE}", folder
        self._open = lambda name: _Lines(folder, name, start_step)
        self._scalars = self._open(FILE)
        self._layers, self._samples = (self._open(name) if (folder.path / name).exists() else None for name in (LAYERS, SAMPLES))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._scalars.write(step, values)

    def layers(self, step: int, sizes: Sizes) -> None:
        self._layers = self._layers or self._open(LAYERS)
        self._layers.write(step, sizes)

    def texts(self, step: int, samples: Sequence[Sample]) -> None:
        self._samples = self._samples or self._open(SAMPLES)
        self._samples.write(step, {"samples": [sample._asdict() for sample in samples]})

    def image(self, step: int, tag: str, png: bytes) -> None:
        self._folder.write(f"{tag.replace('/', '_')}.png", png)

    def close(self, final: Mapping[str, float]) -> None:
        for lines in (self._scalars, self._layers, self._samples):
            if lines is not None:
                lines.close()


class _Lines:
    """A file of one JSON object per line and step, steps ascending. Later values of the same step are added to its line."""

    def __init__(self, folder: RunFolder, name: str, start_step: int) -> None:
        path, self._folder = folder.path / name, folder
        kept = [line + b"\n" for line in _complete_lines(path) if _step_of(line) <= start_step]
        folder.write(name, b"".join(kept))
        self._file = path.open("r+b")
        self._at = sum(map(len, kept[:-1]))  # where the last line starts
        self._line: dict[str, Any] = json.loads(kept[-1]) if kept else {}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._line.get("step") != step:
            self._at, self._line = self._file.seek(0, os.SEEK_END), {}
        self._line |= {"step": step, "time": time.time(), **_legal(values)}
        with self._folder.changing():
            self._file.seek(self._at)
            self._file.write(json.dumps(self._line).encode() + b"\n")
            self._file.truncate()
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _legal(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite are text."""
    if isinstance(value, Mapping):
        return {key: _legal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_legal(each) for each in value]
    return value if isinstance(value, str) or math.isfinite(value) else str(value)


def read_metrics(folder: Path, last: int = sys.maxsize) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl up to a step, {"step": ..., tag: value, ...}, without damaged ones."""
    return _read(folder / FILE, last)


def read_layers(folder: Path, last: int = sys.maxsize) -> list[dict[str, Any]]:
    """The lines of a run's layers.jsonl up to a step, {"step": ..., quantity: {name: [a number for each layer], ...}, ...}."""
    return _read(folder / LAYERS, last)


def read_samples(folder: Path, last: int = sys.maxsize) -> list[dict[str, Any]]:
    """The lines of a run's samples.jsonl up to a step, {"step": ..., "samples": [{"prompt": ..., "text": ...}, ...]}."""
    return _read(folder / SAMPLES, last)


def _read(path: Path, last: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _complete_lines(path) if _step_of(line) <= last]


def layer_tags(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of layers by tag: per_layer_gradient/w_q/03, per_layer_gradient/unembed. In TensorBoard they come after the
    losses."""
    tags = dict[str, Any]()
    for quantity, by_name in sizes.items():
        for name, value in by_name.items():
            values = value if isinstance(value, list) else [value]
            ends = [f"/{i:0{len(str(len(values) - 1))}}" for i in range(len(values))] if isinstance(value, list) else [""]
            tags |= {f"per_layer_{quantity}/{name}{end}": each for end, each in zip(ends, values, strict=True)}
    return tags


def _complete_lines(path: Path) -> list[bytes]:
    """Without the half line that a killed process may leave."""
    return path.read_bytes().rpartition(b"\n")[0].splitlines() if path.is_file() else []


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

    def texts(self, step: int, samples: Sequence[Sample], when: float | None = None) -> None:
        """Adds texts that were sampled, each under a tag of its own."""
        for i, sample in enumerate(samples):
            self.add(text(f"samples/{i}", f"prompt:\n\n{_verbatim(sample.prompt)}\n\n{_verbatim(sample.text)}"), step, when)

    def add(self, summary: Summary, step: int, when: float | None = None) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time() if when is None else when, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _verbatim(content: str) -> str:
    """Text as a block of Markdown that shows it as it is."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{content}\n{fence}"


def board_tag(tag: str) -> str:
    """A tag as TensorBoard shows it: the losses first, since it sorts groups by name."""
    group, _, name = tag.rpartition("/")
    return f"loss/{group}" if group and name == "loss" else tag


class TensorBoard:
    """The scalars, the config and the hyperparameters of a run in TensorBoard."""

    def __init__(self, config: Config, folder: RunFolder, start_step: int) -> None:
        """Replaces the events of earlier processes by the numbers of the record up to start_step. Raises OSError."""
        self.name = f"{folder.name}/events.out.tfevents.*"
        old = list(folder.path.glob("events.out.tfevents.*"))
        self._config, self._events = config, EventFile(folder.path)
        self._events.add(text("config", f"```yaml\n{to_yaml(config)}```"), 0)
        for read, by_tag in ((read_metrics, dict), (read_layers, layer_tags)):
            for line in read(folder.path, start_step):  # numbers that are not finite are text there, which float reads
                values = by_tag({key: value for key, value in line.items() if key not in ("step", "time")})
                self._events.scalars(line["step"], values, line.get("time"))
        for line in read_samples(folder.path, start_step):
            self._events.texts(line["step"], [Sample(**sample) for sample in line["samples"]], line.get("time"))
        self._events.flush()
        for path in old:
            path.unlink(missing_ok=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._events.scalars(step, values)
        self._events.flush()

    def layers(self, step: int, sizes: Sizes) -> None:
        self.write(step, layer_tags(sizes))

    def texts(self, step: int, samples: Sequence[Sample]) -> None:
        self._events.texts(step, samples)
        self._events.flush()

    def image(self, step: int, tag: str, png: bytes) -> None:
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # of the PNG's first chunk
        shown = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        self._events.add(Summary(value=[Summary.Value(tag=tag, image=shown)]), step)
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
        self._image, self._table = wandb.Image, wandb.Table
        run_id, directory = kept.read_text(), str(folder.path)
        self._run = wandb.init(
            project=config.log.wandb, name=config.name, id=run_id, resume="allow", dir=directory, config=redact(asdict(config))
        )
        # Its own count of steps never falls: rows of a resumed run would be refused up to where the run before it had come.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def layers(self, step: int, sizes: Sizes) -> None:
        self.write(step, layer_tags(sizes))

    def image(self, step: int, tag: str, png: bytes) -> None:
        from PIL import Image  # a dependency of matplotlib, which drew the image

        self.write(step, {tag: self._image(Image.open(BytesIO(png)))})

    def texts(self, step: int, samples: Sequence[Sample]) -> None:
        self.write(step, {"samples": self._table(columns=list(Sample._fields), data=[list(sample) for sample in samples])})

    def close(self, final: Mapping[str, float]) -> None:
        self._run.summary.update(dict(final))
        self._run.finish(exit_code=int(not final))  # no results: the run did not finish
