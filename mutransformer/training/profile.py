"""Profiler traces of a window of a run's steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mutransformer.config.run import ProfileConfig


class Profile:
    """Traces steps start ... stop - 1 on process 0, none if stop = 0: .xplane.pb for TensorBoard, .trace.json.gz for Perfetto.

    They go to plugins/profile below the directory, where TensorBoard looks for them. wait_for gives arrays of the step before,
    which are waited for where the trace starts or stops, so that it holds complete steps.
    """

    def __init__(self, window: ProfileConfig, directory: Path, wait_for: Callable[[], Any] = lambda: None) -> None:
        self._window, self._directory, self._wait_for, self.running = window, directory, wait_for, False
        self._enabled = jax.process_index() == 0

    def step(self, i: int) -> None:
        """Starts or stops the trace if step i, counted from 0 and about to be dispatched, is the first in or after the window."""
        within = self._enabled and self._window.start <= i < self._window.stop
        if within and not self.running:  # a run that resumes within the window traces the rest of it
            jax.block_until_ready(self._wait_for())
            jax.profiler.start_trace(self._directory)
            self.running = True
        elif self.running and not within:
            self.close()

    def close(self) -> None:
        """Stops a trace that is still running."""
        if self.running:
            self.running = False
            jax.block_until_ready(self._wait_for())
            jax.profiler.stop_trace()
