"""The processes of a run: joining them with jax.distributed, and comparing what they have."""

import errno
import itertools
import json
import logging
import os
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from mutransformer.config.run import DistributedConfig
from mutransformer.config.schema import Config
from mutransformer.errors import USAGE_ERROR, ConfigError, check, first_line, translate_errors
from mutransformer.sharding.stopping import Stopped

_PATIENCE = 24 * 3600  # seconds: one host may have to tokenize everything while others wait; JAX notices a dead host much earlier
FAILED = "mutransformer/failed"  # the folder of keys by which processes announce that they failed
_STOPPED = "stopped: "  # begins what is announced of a process that was asked to stop
# A gRPC server, as JAX's coordinator is one, answers this begin of a connection by a frame of settings.
_HTTP2_SETTINGS = b"\x04"  # the type of a frame, its fourth byte
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0" + _HTTP2_SETTINGS + b"\0" * 5
_calls = itertools.count()  # of assert_equal_across_processes: no key of the service is written twice


@dataclass(frozen=True)
class Processes:
    """The processes of a run that divide work."""

    count: int = 1
    index: int = 0  # of this one
    barrier: Callable[[str], None] = lambda name: None  # returns once all have called it, in the same order; name: for messages

    @contextmanager
    def first_in_process_0(self, name: str) -> Iterator[None]:
        """Runs the body in process 0 and then, unless it failed, in the others, which find what it made."""
        if self.index:
            self.barrier(name)
        yield
        if not self.index:
            self.barrier(name)


SINGLE_PROCESS = Processes()


def all_processes() -> Processes:
    """The processes of this run; a single one if jax.distributed is not initialized."""
    import jax

    if not jax.distributed.is_initialized():
        return SINGLE_PROCESS
    return Processes(jax.process_count(), jax.process_index(), partial(assert_equal_across_processes, parts={}))


@contextmanager
def announce_failure() -> Iterator[None]:
    """If the body fails or is stopped, ends the processes that wait for this one in assert_equal_across_processes."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, Stopped) as error:
        if sys.modules.get("jax"):
            import jax
            from jax._src import distributed  # the key-value store has no public interface

            if client := distributed.global_state.client:
                failure = f"process {jax.process_index()} failed: {first_line(error)}"
                if isinstance(error, Stopped):
                    failure = f"{_STOPPED}{error}"
                with suppress(RuntimeError):  # the coordinator has ended already, and with it every process that waits
                    client.key_value_set(f"{FAILED}/{jax.process_index()}", failure)
        raise


def simulate_devices(n: int) -> None:
    """Makes JAX see n devices on a CPU, to compute as many runs at once: a small model keeps only one core busy.

    Call it before JAX starts. A number of devices in XLA_FLAGS takes precedence; an accelerator ignores this.
    """
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", n)


def prepare_jax(config: Config) -> None:
    """Joins the other processes of the run, and makes malloc keep freed memory, and JAX compiled programs.

    Raises ConfigError as join_processes does.
    """
    join_processes(config.distributed)
    from mutransformer.sharding.compile_cache import keep_compiled
    from mutransformer.sharding.devices import keep_freed_memory

    keep_freed_memory()
    keep_compiled(config.compile_cache)


def join_processes(config: DistributedConfig) -> None:
    """Joins the other processes of the run if there are any. Raises ConfigError if they are not reached in time, or not found."""
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    enabled = coordinator is not None if config.enabled is None else config.enabled
    if not enabled:
        return
    if coordinator is not None:
        if config.process_id:
            _wait_for(coordinator, config.timeout)
        elif config.process_id == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            _check_port(coordinator)
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # Watch and StopRequest do more: any signal, at any time
    n, where = config.n_process or "all", f"distributed.coordinator = {coordinator}" if coordinator else "distributed"
    late = f"{where}: {n} processes did not join within distributed.timeout = {config.timeout} s"
    with (
        translate_errors("distributed: cannot join the other processes", (RuntimeError, ValueError)),
        _limit(config.timeout, late),
    ):
        jax.distributed.initialize(config.coordinator, config.n_process, config.process_id, initialization_timeout=_PATIENCE)
    logging.getLogger(__name__).info("process %d of %d", jax.process_index(), jax.process_count())


def assert_equal_across_processes(what: str, parts: Mapping[str, str]) -> None:
    """Waits until all processes of the run have called this in the same order of calls, and compares their values by name.

    It uses JAX's coordination service, since a collective of the devices times out long before a slow process may have its data.
    `what` names what is compared, for the message. With a single process it returns at once. Raises ConfigError if processes
    disagree (raised on all), one failed, or one did not arrive within 24 h; Stopped if one was asked to stop.
    """
    import jax

    n = jax.process_count()
    if n == 1:
        return
    from jax._src import distributed  # the key-value store has no public interface

    client, call, until = distributed.global_state.client, next(_calls), time.monotonic() + _PATIENCE
    assert client is not None

    def parts_of(process: int) -> dict[str, str]:
        while True:
            try:  # short waits, between which Python handles signals
                return json.loads(client.blocking_key_value_get(f"mutransformer/equal/{call}/{process}", 2000))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if failures := client.key_value_dir_get(FAILED):
                reason = failures[0][1]
                if reason.startswith(_STOPPED):
                    raise Stopped(reason.removeprefix(_STOPPED))
                raise ConfigError(f"{what}: {reason}")
            if time.monotonic() > until:
                raise ConfigError(f"{what}: process {process} of {n} is not ready after {_PATIENCE // 3600} hours")

    client.key_value_set(f"mutransformer/equal/{call}/{jax.process_index()}", json.dumps(dict(parts)))
    first = parts_of(0)
    for process in range(1, n):
        other = parts_of(process)
        differ = [name for name in first if first[name] != other.get(name)]
        if differ:
            ours, theirs = _short(first[differ[0]]), _short(other.get(differ[0], "none"))
            raise ConfigError(
                f"{what} differs between process 0 and {process}: {', '.join(differ)} (process 0 has {differ[0]} {ours}, "
                f"process {process} {theirs}); they must agree"
            )


def _short(value: str) -> str:
    """A value for a message: a checksum by its first digits."""
    return value[:8] if len(value) == 64 else textwrap.shorten(value, 60, placeholder="...")


@contextmanager
def _limit(seconds: int, message: str) -> Iterator[None]:
    """Ends the process with a message if the body takes longer. JAX's own time limit aborts it with a stack trace."""

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(USAGE_ERROR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_port(coordinator: str) -> None:
    """Raises ConfigError if process 0 cannot listen at the port of the coordinator, of which gRPC would log more than a line."""
    prefix = f"distributed.coordinator = {coordinator}: process 0 cannot listen at its port"
    with translate_errors(prefix, (OSError, ValueError, OverflowError)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was in use a moment ago is free
            probe.bind(("", int(coordinator.rpartition(":")[2])))
            probe.listen()


def _wait_for(coordinator: str, timeout: int) -> None:
    """Waits until the coordinator answers, since JAX aborts the process with a stack trace if it does not.

    Raises ConfigError if it does not answer in time, or something else does.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(1, deadline - time.monotonic())
            ) as connection:
                connection.sendall(_HTTP2_HELLO)
                if answer := connection.recv(9):
                    break
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        except (OSError, ValueError, OverflowError) as error:
            left = deadline - time.monotonic()
            if left <= 0 or not isinstance(error, OSError):
                late = f"not reached within distributed.timeout = {timeout} s: {first_line(error)}"
                raise ConfigError(f"distributed.coordinator = {coordinator}: {late}") from None
        time.sleep(min(0.5, left))
    other = "what listens there is not process 0 of a run, but something else"
    check(answer[3:4] == _HTTP2_SETTINGS, f"distributed.coordinator = {coordinator}: {other}")
