"""What a run reports of its layers: rows and scalars by the sinks, and heat maps over layers and steps.

Like the scalars of `training.metrics`, the numbers of a step are read one step late, so that the loop never waits for the device.
"""

import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jax import Array

from mutransformer.errors import first_line
from mutransformer.training.heat_maps import History, heat_map
from mutransformer.training.layer_sizes import QUANTITIES, Layout
from mutransformer.training.sinks import Sink, read_layers

DRAWING = 0.005  # the largest share of a run's time that drawing takes while it goes on
SECONDS = 2.0  # that the first drawing may take

_log = logging.getLogger(__name__)


class LayerLog:
    """The layers' sizes of a run in process 0."""

    def __init__(self, folder: Path, start_step: int, draws: bool, to_sinks: Callable[[Callable[[Sink], None]], None]) -> None:
        """draws: whether heat maps are wanted. to_sinks: calls a function with every sink."""
        self._folder, self._start_step, self._to_sinks = folder, start_step, to_sinks
        self._pending: tuple[int, Array] | None = None
        self._layout: Layout | None = None
        self._history = History()
        self._drawn, self._next = start_step, time.monotonic() + SECONDS / DRAWING
        self._draws = draws and find_spec("matplotlib") is not None
        if draws and not self._draws:
            _log.warning("log.layers: without heat maps, which need a package: pip install 'mutransformer[plots]'")

    def take(self, step: int, numbers: Array, layout: Layout) -> None:
        """Keeps the numbers of a step just dispatched until `read`."""
        if self._layout is None:
            for row in read_layers(self._folder, self._start_step):  # of the run before it was resumed
                self._history.add(row["step"], row)
        self._pending, self._layout = (step, numbers), layout

    def read(self) -> None:
        """Waits for the numbers that were taken last, and writes them."""
        if self._pending is not None and self._layout is not None:
            (step, numbers), self._pending = self._pending, None
            sizes = self._layout.split(np.asarray(numbers))
            self._history.add(step, sizes)
            self._to_sinks(lambda sink: sink.layers(step, sizes))

    def draw(self, step: int, last: bool = False) -> None:
        """Draws the heat maps, if there are new numbers, and writes them as of a step.

        last: the run ends; else nothing is drawn unless that takes little of the run's time.
        """
        latest = self._history.steps[-1] if self._history.steps else 0
        if not self._draws or self._layout is None or latest <= self._drawn or not (last or time.monotonic() >= self._next):
            return
        began = time.monotonic()
        try:
            images = {f"per_layer/{quantity}": heat_map(self._history, quantity, self._layout) for quantity in QUANTITIES}
        except Exception as error:  # whatever it is: training does not depend on it
            _log.warning("heat maps of the layers cannot be drawn: %s; training goes on without", first_line(error))
            self._draws = False
            return
        for tag, png in images.items():
            self._to_sinks(lambda sink, tag=tag, png=png: sink.image(max(step, latest), tag, png))
        now = time.monotonic()
        self._drawn, self._next = latest, now + (now - began) / DRAWING
