"""Reads from the metrics which steps a run skipped as bad, logs them, and lists them in bad_steps.jsonl."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mutransformer.config.run import BadStepsConfig
from mutransformer.training.run_folder import RunFolder

FILE = "bad_steps.jsonl"
READ_EVERY = 8  # steps: their scalars have long been computed when they are read

_log = logging.getLogger(__name__)


class NonFiniteLoss(FloatingPointError):
    """The loss of a step, or the weights after it, are NaN or infinite."""


class SkippedSteps:
    """The skipped steps of a run, in bad_steps.jsonl: {"step", "loss", "gradient_norm", "rows"}.

    A run that resumes before a step that is listed there skips it again, on whatever devices.
    """

    def __init__(self, config: BadStepsConfig, folder: RunFolder, start: int, rows: Callable[[int], list[int]]) -> None:
        """start: updates completed; a run that starts anew forgets the list of one before. rows: of a step, their indices."""
        self._config, self._folder, self._rows = config, folder, rows
        self._unread: list[tuple[int, Mapping[str, Any]]] = []
        self._in_a_row = 0
        self._lines = _read(folder) if start else []
        if not start and jax.process_index() == 0:
            (folder.path / FILE).unlink(missing_ok=True)
        self.known = frozenset(line["step"] for line in self._lines if line["step"] > start)

    def record(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Takes the device's scalars of a step just dispatched. Now and then it reads those of earlier steps, as read() does."""
        if len(self._unread) >= READ_EVERY:
            self.read()
        self._unread.append((step, scalars))

    def read(self) -> None:
        """Waits for the recorded steps; logs and lists those that were skipped.

        Raises NonFiniteLoss if so many in a row were skipped as bad_steps.limit allows.
        """
        unread, self._unread = self._unread, []
        for step, scalars in unread:
            if not float(scalars["skipped"]):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            self._add(step, float(scalars["loss"]), float(scalars["gradient_norm"]))
            if self._in_a_row >= self._config.limit:
                many = f"{self._in_a_row} steps in a row were skipped (bad_steps.limit), see {self._folder.path / FILE}"
                raise NonFiniteLoss(f"step {step}: the loss is {float(scalars['loss']):g}; {many}")

    def _add(self, step: int, loss: float, norm: float) -> None:
        if jax.process_index() != 0:
            return
        text = "step %d was skipped: loss %g, gradient norm %g; its rows: mutransformer inspect-data ... --step %d"
        _log.warning(text, step, loss, norm, step)
        line = {"step": step, "loss": _legal(loss), "gradient_norm": _legal(norm), "rows": self._rows(step)}
        self._lines = [other for other in self._lines if other["step"] != step] + [line]
        try:
            self._folder.write(FILE, "".join(json.dumps(line) + "\n" for line in self._lines).encode())
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._folder.path / FILE, error.strerror)


def _legal(value: float) -> float | str:
    """A number as JSON allows it."""
    return value if math.isfinite(value) else str(value)


def _read(folder: RunFolder) -> list[dict[str, Any]]:
    path = folder.path / FILE
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if isinstance(line["step"], int)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("%s cannot be read, so no step is skipped for it: %s", path, error)
        return []
