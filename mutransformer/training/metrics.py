"""What a run reports while it trains: its scalars, on the console and in the sinks of mutransformer.training.sinks.

Scalars arrive while the device still computes them and are read one step late, so the loop never waits. Only process 0 writes.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import jax
import rich
from jax import Array
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from mutransformer.config.schema import Config
from mutransformer.errors import ConfigError, first_line, redact
from mutransformer.sharding.devices import memory_in_use, peak_flops
from mutransformer.training import sinks
from mutransformer.training.layer_log import LayerLog
from mutransformer.training.layer_sizes import Layout
from mutransformer.training.run_folder import RunFolder
from mutransformer.training.sinks import JsonLines, Sample, Sink, TensorBoard, WeightsAndBiases
from mutransformer.training.skipped_steps import NonFiniteLoss

_TAGS = {"loss": "train/loss", "learning_rate": "optim/learning_rate"}
_TAGS |= {f"{name}_norm": f"norm/{name}" for name in ("gradient", "parameter", "update")}
_LINE = {"train/loss": "loss {:7.4f}", "optim/learning_rate": "lr {:.2e}", "norm/gradient": "grad {:6.3f}"}
_LINE |= {"speed/mfu": "mfu {:.1%}"}
_BAR = {"train/loss": "loss {:.4f}"}  # more does not fit in 80 columns; validation losses are lines above it


_log = logging.getLogger(__name__)


class Diverged(FloatingPointError):
    """The final loss is finite, but far above that of equal probabilities for all ids."""


def setup_logging() -> None:
    """Prints the package's log messages on rich.get_console(), above a running bar. Does not start JAX."""
    logger = logging.getLogger("mutransformer")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries add handlers to the root logger
    # Orbax warns about options that are set on purpose, and prints the traceback of every error that it raises later.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())


class Metrics:
    """Writes a run's scalars, with the same tags, to the console, metrics.jsonl and the services that the config names.

    A context manager: leaving it closes all files. Logged are the first step after start_step, multiples of log.every and the
    last step. Rates are measured from one logged step to the next, so compilation, in the first step, does not count.
    """

    def __init__(self, config: Config, folder: RunFolder, flops_per_token: float, n_device: int, start_step: int) -> None:
        """Opens the files in the run's folder and drops what an earlier process wrote after start_step, the updates completed.

        flops_per_token: of the model, forward and backward. n_device: in all processes. Raises ConfigError if log.wandb is set
        and the package is missing.
        """
        self._config, self._flops_per_token, self._start_step = config, flops_per_token, start_step
        self._peak = (peak_flops(jax.devices()[0].device_kind) or 0) * n_device  # 0: unknown
        self._pending: tuple[int, Mapping[str, SupportsFloat], float | None] | None = None
        self._mark: tuple[int, float] | None = None  # the last logged step and the time of its end
        self._step, self._latest = start_step, dict[str, float]()
        self._sinks: list[Sink] = []
        self._writes = jax.process_index() == 0
        self._layers = LayerLog(folder.path, start_step, self._writes and config.log.layers > 0, self._each_sink)
        self._console = rich.get_console() if self._writes else Console(quiet=True)
        done = (
            TextColumn("{task.percentage:.0f}%"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        )
        columns = *done, TextColumn("{task.description}", markup=False), _Elapsed()
        self._bar = _Bar(*columns, console=self._console, expand=True, refresh_per_second=4)
        self._task = self._bar.add_task("compiling", total=config.steps, completed=start_step)
        if self._writes:
            folder.path.mkdir(parents=True, exist_ok=True)
            if config.log.wandb is not None:  # first: the package may be missing
                self._open("Weights & Biases", lambda: WeightsAndBiases(config, folder, start_step))
            self._open(sinks.FILE, lambda: JsonLines(folder, start_step))
            if config.log.tensorboard:
                self._open("TensorBoard's events", lambda: TensorBoard(config, folder, start_step))

    def __enter__(self) -> "Metrics":
        if self._writes and self._console.is_interactive:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._layers.draw(self._step, last=True)
            self._release({})

    def note(self, text: str) -> None:
        """Prints text that belongs to no step."""
        _say(self._console, text)

    def record(self, step: int, device_scalars: Mapping[str, SupportsFloat]) -> None:
        """Takes the scalars of a step just dispatched, and writes those of the previous step if it is to be logged.

        step: updates completed after this step. device_scalars: arrays of shape [], the same in all processes: loss (mean nats
        per target), skipped (1: SkippedSteps deals with it) and others to log. Raises NonFiniteLoss if the loss of a logged step
        that was not skipped, or the norm of the weights, is NaN or infinite; it is written nevertheless.
        """
        # The device may be done already, as a CPU that computes while it dispatches: then the step ended here, not when read.
        done = time.perf_counter() if getattr(device_scalars["loss"], "is_ready", lambda: True)() else None
        before, self._pending = self._pending, (step, device_scalars, done)
        self._bar.update(self._task, completed=step - 1)  # the step before this one is computed, or nearly
        self._layers.read()  # first: also those of a step that ends the run
        if before and self._due(before[0]):
            self._read(*before)
        if step == self._start_step + 1:  # compilation took longer than this wait, and the first loss is worth seeing at once
            self.flush()

    def layers(self, step: int, sizes: Array, layout: Layout) -> None:
        """Takes the sizes of the layers around the step that was recorded last; written as its scalars are, one step late."""
        if self._writes:
            self._layers.take(step, sizes, layout)

    def heat_maps(self) -> None:
        """Draws the sizes of the layers, if that takes little of the run's time."""
        self._layers.draw(self._step)

    def flush(self) -> None:
        """Waits for the last recorded step and writes it if it is to be logged: before an evaluation, a checkpoint, the exit.

        Raises NonFiniteLoss if its loss or weights are not finite, even if it is not logged: they must not become a checkpoint.
        """
        before, self._pending = self._pending, None
        self._layers.read()
        if before:
            self._read(*before)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Flushes, and excludes the time within from the rates: for evaluations and checkpoints. Raises as flush does."""
        self.flush()
        start = time.perf_counter()
        yield
        if self._mark:
            self._mark = self._mark[0], self._mark[1] + time.perf_counter() - start

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes host values, such as an evaluation's results, by tag: {"validation/loss": 3.2}. step: updates completed."""
        self._write(step, values)
        group = next(iter(values)).partition("/")[0]
        named = (f"{tag.removeprefix(group + '/').replace('_', ' ')} {value:.5g}" for tag, value in values.items())
        self.note(f"step {self._at(step)}  {group} {'  '.join(named)}")
        self._bar.update(self._task, description=self._in_bar(step))

    def texts(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes texts that were sampled after a step, and shows them, each on a line."""
        self._each_sink(lambda sink: sink.texts(step, samples))
        for sample in samples:
            self.note(f"step {self._at(step)}  sample  {sample.prompt!r} -> {sample.text!r}")

    def close(self, final: Mapping[str, float]) -> None:
        """Flushes, writes settings and final results (by tag) for tables that compare runs, and closes. Raises as flush does.

        Results that were not passed to scalars before are written as by scalars, at the last step.
        """
        self.flush()
        self._layers.draw(self._step, last=True)
        if not final.items() <= self._latest.items():
            self.scalars(self._step, final)
        self._release(final)

    def _due(self, step: int) -> bool:
        return step in (self._start_step + 1, self._config.steps) or step % self._config.log.every == 0

    def _read(self, step: int, device_scalars: Mapping[str, SupportsFloat], done: float | None) -> None:
        # All processes check the loss: if one alone stopped, the others would wait in a collective for ever.
        loss = float(device_scalars["loss"])
        if self._writes and self._due(step):
            values = {
                _TAGS.get(key, f"train/{key}"): float(value)
                for key, value in device_scalars.items()
                if key not in ("loss", "skipped")
            }
            values |= {"train/loss": loss, "train/perplexity": math.inf if loss > 700 else math.exp(loss)}
            values |= self._rates(step, time.perf_counter() if done is None else done)
            values |= {f"memory/{key}": float(value) for key, value in (memory_in_use(jax.local_devices()) or {}).items()}
            self._write(step, values)
            self._bar.update(self._task, completed=step, description=self._in_bar(step))
            if not self._console.is_interactive:
                left = f"eta {self._left(step, values)}" if "speed/step_seconds" in values else ""
                self.note("  ".join(filter(None, [f"step {self._at(step)}", *_formatted(values, _LINE), left])))
        if not math.isfinite(loss) and not float(device_scalars.get("skipped", 0.0)):
            raise NonFiniteLoss(f"step {step}: the loss is {loss}")
        # The loss is from before the update: the weights after it may not be finite.
        size = float(device_scalars.get("parameter_norm", 0.0))
        if not math.isfinite(size):
            raise NonFiniteLoss(f"step {step}: the norm of the weights after the update is {size}")

    def _rates(self, step: int, now: float) -> dict[str, float]:
        before, self._mark = self._mark, (step, now)
        if before is None:
            return {}
        seconds = (now - before[1]) / (step - before[0])
        tokens = self._config.tokens_per_step / seconds
        flops = self._flops_per_token * tokens
        rates = {"step_seconds": seconds, "tokens_per_second": tokens, "model_flops_per_second": flops}
        if self._peak:
            rates["mfu"] = flops / self._peak
        return {f"speed/{key}": value for key, value in rates.items()}

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        self._latest.update(values)
        self._each_sink(lambda sink: sink.write(step, values))

    def _each_sink(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:  # whatever it is: training does not depend on it
                self._sinks.remove(sink)
                _give_up(sink.name, error)
                with contextlib.suppress(Exception):
                    sink.close({})

    def _in_bar(self, step: int) -> str:
        """The latest numbers, for the progress bar, which itself counts the steps."""
        left = f"{self._left(step, self._latest)} left" if "speed/step_seconds" in self._latest else ""
        return "  ".join(filter(None, [*_formatted(self._latest, _BAR), left]))

    def _left(self, step: int, values: Mapping[str, float]) -> str:
        return _duration((self._config.steps - step) * values["speed/step_seconds"])

    def _at(self, step: int) -> str:
        return f"{step:>{len(str(self._config.steps))}}/{self._config.steps}"

    def _release(self, final: Mapping[str, float]) -> None:
        opened, self._sinks = self._sinks, []
        for sink in opened:
            try:
                sink.close(final)
            except Exception as error:  # the run has ended; its checkpoint must not depend on it
                _give_up(sink.name, error)
        if self._bar.live.is_started:
            self._bar.stop()

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        """Opens a sink. One that cannot be opened is left out, with a warning. Raises ConfigError as the sink does."""
        try:
            self._sinks.append(make())
        except ConfigError:
            raise
        except Exception as error:
            _give_up(name, error)


class _Bar(Progress):
    """A progress bar that leaves room for the ^C which a terminal adds: on a new line that would leave the bar behind."""

    def get_renderable(self) -> RenderableType:
        return _Narrower(super().get_renderable())


@dataclass
class _Narrower:
    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield from console.render(self.content, options.update_width(options.max_width - len("^C") - 1))


class _Elapsed(TimeElapsedColumn):
    """The time since the start, with its label."""

    def render(self, task: Task) -> Text:
        return Text(f"{_duration(task.elapsed or 0.0)} elapsed", style="progress.elapsed")


def _formatted(values: Mapping[str, float], formats: Mapping[str, str]) -> list[str]:
    """Some of the values, and the speed."""
    parts = [text.format(values[tag]) for tag, text in formats.items() if tag in values]
    speed = values.get("speed/tokens_per_second")
    return parts if speed is None else [*parts, f"{speed / 1000:,.1f}k tok/s"]


def _give_up(name: str, error: Exception) -> None:
    _log.warning("%s cannot be written: %s; training goes on without", name, first_line(error))


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        _say(rich.get_console(), level + self.format(record))


def _say(console: Console, text: str) -> None:
    console.print(redact(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{second:02}s"
