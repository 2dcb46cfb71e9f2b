"""Watches the processes of a run. A process that is stuck, failed or gone is named and ends the run; all stop at the same step.

A collective waits for ever for a process that never comes, and while it waits the main thread can do nothing. So a thread of each
process looks after it. The threads meet in JAX's coordination service, since no device is needed for that.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutransformer.config.run import WatchdogConfig
from mutransformer.errors import STUCK, first_line
from mutransformer.sharding.processes import FAILED

_SIGNS = "mutransformer/signs"  # a key for each process: what it does, with a number that grows, as a sign of life
_STOPS = "mutransformer/stops"  # a key for each process that was asked to stop
_TICKS = "mutransformer/ticks"  # a key for each process, once one was asked: how often it had polled
_LONGEST = 20.0  # times the longest step so far: by default a longer one is stuck
_STOPPED = 5.0  # seconds: no thread waits that long for its turn
_ALIKE = 10.0  # seconds that a process has to fail by itself, as when the loss of all is NaN, after another one failed
_PUBLISHED = 10.0  # seconds: the network may be what is stuck
_SHORTEST = 300.0  # seconds: by default no step is stuck before that


@dataclass
class _Peer:
    """What is known of another process."""

    sign: dict[str, Any]  # the latest it published
    since: float  # when that changed, by this process's clock

    def __str__(self) -> str:
        return f"on host {self.sign.get('host')}, which was {self.sign.get('doing')}"


class Watch:
    """Watches the main thread of this process and, if the run has several, the other processes."""

    def __init__(self, config: WatchdogConfig, folder: Path, publish: Callable[[], None] = lambda: None) -> None:
        """folder: gets the stacks of a process that is stuck. publish: makes the other machines see what is written there."""
        import jax
        from jax._src import distributed  # the key-value store has no public interface

        self._config, self._folder, self._publish = config, folder, publish
        self._index, self._count = jax.process_index(), jax.process_count()
        self._client: Any = distributed.global_state.client if self._count > 1 else None
        self.starting("starting")
        self._peers: dict[int, _Peer] = {}
        self._failure_seen: float | None = None  # when another process announced that it failed
        self._lock = threading.Lock()  # held while the processes agree on when to stop: no poll passes meanwhile
        self._asked, self._ticks, self._last_tick = False, 0, sys.maxsize
        self._ended = threading.Event()
        # Thousands of processes must not keep the coordinator busy.
        self._pause = max(0.5, self._count / 100)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    @contextmanager
    def running(self) -> Iterator["Watch"]:
        """Watches within the block."""
        self._thread.start()
        try:
            yield self
            if self._client is not None:  # only of a process that completed the block need the others expect no more signs
                with suppress(RuntimeError):
                    self._client.key_value_set(f"{_SIGNS}/{self._index}", json.dumps({"ended": True}), allow_overwrite=True)
        finally:
            self._ended.set()
            self._thread.join(10)

    def starting(self, what: str) -> None:
        """Starts new work that is compiled first: the time limit no longer depends on the steps so far."""
        self.doing(what)
        self._steps, self._step_began = 0, 0.0  # how many began, and when the latest did
        self._longest = 0.0  # seconds of a completed step, but for the first, which includes compilation

    def doing(self, what: str, slow: bool = False) -> None:
        """Records what the main thread does from now on, such as "waiting for the batch of step 7". Each call counts as progress.

        slow: the limit is start_timeout, however short the steps are. For a save, which waits for a disk or a network.
        """
        self._doing, self._since, self._slow = what, time.monotonic(), slow

    def step_begins(self) -> None:
        """Marks the start of a step, which is also the end of the step before."""
        now = time.monotonic()
        if self._steps >= 2:
            self._longest = max(self._longest, now - self._step_began)
        self._steps, self._step_began = self._steps + 1, now

    def agree(self, asked: bool) -> bool:
        """Whether to stop here: the same answer in all processes, which call this in the same order. asked: this one was."""
        if self._client is None:
            return asked
        self._asked |= asked
        with self._lock:
            self._ticks += 1
            return self._ticks >= self._last_tick

    def explain(self) -> None:
        """Call it when a collective failed: if another process is gone, this one is ended here, with a message that names it.

        Returns shortly after peer_timeout otherwise.
        """
        if self._client is not None:
            self._ended.wait(self._config.peer_timeout + 5)

    def _run(self) -> None:
        turn, before = 0, time.monotonic()
        while not self._ended.wait(self._pause):
            turn, now = turn + 1, time.monotonic()
            self._leave_out(now - before - self._pause)
            before = now
            limit = self._limit()
            if limit and time.monotonic() - self._since > limit:
                self._stuck(limit)
            if self._client is None:
                continue
            try:
                self._exchange(turn)
            except RuntimeError as error:
                if not self._ended.is_set():
                    end(f"the coordinator, process 0, is gone, or cannot be reached: {first_line(error)}")

    def _leave_out(self, late: float) -> None:
        """If this thread did not run either, the whole process was stopped, as by Ctrl-Z: that is no lack of progress."""
        if late > _STOPPED:
            self._since += late
            for peer in self._peers.values():
                peer.since += late

    def _limit(self) -> float:
        """Seconds without progress after which the main thread is stuck; 0: it never is."""
        if self._longest == 0.0 or self._slow:
            return self._config.start_timeout
        if self._config.timeout is not None:
            return self._config.timeout
        return max(_SHORTEST, _LONGEST * self._longest)

    def _exchange(self, turn: int) -> None:
        """Publishes what this process does, and reads what the others do, and whether one failed or was asked to stop."""
        sign = {"turn": turn, "doing": self._doing, "ticks": self._ticks, "host": socket.gethostname(), "pid": os.getpid()}
        self._client.key_value_set(f"{_SIGNS}/{self._index}", json.dumps(sign), allow_overwrite=True)
        now = time.monotonic()
        for key, value in self._client.key_value_dir_get(_SIGNS):
            index, sign = int(key.rpartition("/")[2]), json.loads(value)
            known = self._peers.get(index)
            if known is None or known.sign != sign:
                self._peers[index] = _Peer(sign, now)
        for index, peer in self._peers.items():
            silent = now - peer.since
            if index != self._index and not peer.sign.get("ended") and silent > max(self._config.peer_timeout, 3 * self._pause):
                end(f"process {index} {peer}, has given no sign for {silent:.0f} s: it was killed, or its host is gone")
        if failures := self._client.key_value_dir_get(FAILED):
            self._failure_seen = self._failure_seen or now
            if now - self._failure_seen > _ALIKE:
                end(failures[0][1])
        if self._last_tick == sys.maxsize and (self._asked or self._client.key_value_dir_get(_STOPS)):
            self._agree_on_the_last_tick()

    def _agree_on_the_last_tick(self) -> None:
        """All processes stop at the first tick that none of them has passed."""
        with self._lock:
            self._client.key_value_set(f"{_STOPS}/{self._index}", "1", allow_overwrite=True)
            self._client.key_value_set(f"{_TICKS}/{self._index}", str(self._ticks), allow_overwrite=True)
            until = time.monotonic() + self._config.peer_timeout
            while len(ticks := self._client.key_value_dir_get(_TICKS)) < self._count:
                if time.monotonic() > until:
                    missing = sorted(set(range(self._count)) - {int(key.rpartition("/")[2]) for key, _ in ticks})
                    end(f"process {missing[0]} does not answer the request to stop")
                time.sleep(0.05)
            self._last_tick = 1 + max(int(value) for _, value in ticks)

    def _stuck(self, limit: float) -> None:
        """Ends this process, whose main thread makes no progress: writes the stacks, and names the process that is behind."""
        path = self._folder / f"stacks-{self._index}-{time.time():.0f}.txt"
        told = f"the stacks of its threads are in {path}"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file)
            publisher = threading.Thread(target=self._publish, daemon=True)
            publisher.start()
            publisher.join(_PUBLISHED)
        except OSError as error:
            told = f"its stacks cannot be written: {first_line(error)}"
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        text = f"process {self._index} has been {self._doing} for {limit:.0f} s; {told}"
        signs = {index: peer.sign for index, peer in self._peers.items() if "ticks" in peer.sign}
        if signs:
            late = min(signs, key=lambda index: (signs[index]["ticks"], index != self._index))
            if late != self._index and signs[late]["ticks"] < self._ticks:
                text += f". It waits for process {late} {self._peers[late]}"
        end(text)


def end(message: str) -> None:
    """Ends the process at once with STUCK, in one line: its main thread is within a call that does not return."""
    with suppress(OSError):
        os.write(2, f"error: {message}; the same command resumes\n".encode())
    os._exit(STUCK)
