"""From a command line to a function of a Config: arguments, help, one-line errors, signals, and jax.distributed."""

import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mutransformer.config import load as settings
from mutransformer.config.schema import Config, ConfigError, DistributedConfig

# Exit codes.
FINISHED = 0
FAILED = 1
MISTAKE = 2  # the user can mend it
INTERRUPTED = 130  # by Ctrl-C, with nothing saved
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, all is saved, the same command goes on

_PATIENCE = 24 * 3600  # seconds: one host may have to tokenise all while another has it; JAX sees one that died much earlier

_calls = itertools.count()  # of agreed: no key of the service is written twice


def launch(main: Callable[[Config], int], description: str, argv: Sequence[str] | None = None) -> int:
    """Reads a config from the command line and calls main with it, once all processes of the run have met.

    Args:
        main: gets the config, returns the exit code; imports JAX itself, so that a mistake in a YAML is told before JAX starts.
        description: for --help.
        argv: None for the command line.

    Returns:
        The exit code, main's or as `guarded` says.
    """
    parser = command(description)
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and exit")
    given = parser.parse_intermixed_args(argv)

    def run() -> int:
        config = settings.load(given.args)
        if given.print_config:
            print(settings.to_yaml(config), end="")
            return FINISHED
        prepare_jax(config.distributed)
        return main(config)

    return guarded(run)


def command(description: str) -> ArgumentParser:
    """A parser that takes YAML files and overrides, with every setting in its help. Options are to be added."""
    parser = ArgumentParser(
        description=description,
        epilog="settings and their defaults:\n\n" + settings.describe(),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("args", nargs="*", metavar="FILE.yaml | key=value", help="merged left to right over the defaults")
    return parser


def guarded(run: Callable[[], int]) -> int:
    """What run returns; or a line on standard error and an exit code.

    MISTAKE for a ConfigError or a file that cannot be read or written, FAILED for a loss that is not finite or where a device has
    too little memory, INTERRUPTED for Ctrl-C outside of training.
    """
    try:
        return run()
    except ConfigError as error:
        _complain(error)
        return MISTAKE
    except OSError as error:  # the disk is full, a file is not ours to write
        _complain(ConfigError(f"{error.filename}: {error.strerror}") if error.filename else error)
        return MISTAKE
    except FloatingPointError as error:
        _complain(error)
        return FAILED
    except KeyboardInterrupt:  # before there is anything to save, or again
        _complain("interrupted")
        return INTERRUPTED
    except RuntimeError as error:  # JAX's, by what it says: JAX may not be imported
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        told = str(error).strip().splitlines()[0]
        _complain(
            f"{told}; less memory is needed with a smaller data.batch_size, optim.grad_accumulation_steps, or another model.remat"
        )
        return FAILED


def simulate_devices(n: int) -> None:
    """On a CPU: makes JAX see n devices, so that as many runs are computed side by side. Before JAX starts.

    A small model keeps no more than one core busy. A number in XLA_FLAGS is left as it is; an accelerator does not heed this.
    """
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", n)


def prepare_jax(config: DistributedConfig) -> None:
    """Joins the other processes of the run, and sets what must be set once. Raises ConfigError as connect does."""
    connect(config)
    from mutransformer.sharding.devices import keep_freed_memory

    keep_freed_memory()


@dataclass
class StopRequest:
    """Whether the program was asked to end early."""

    requested: bool = False


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM and Ctrl-C into a request; a second Ctrl-C ends the process at once.

    With several processes the signals are left alone: JAX itself listens, so that all can agree on a step.
    """
    import jax

    request = StopRequest()
    if jax.process_count() > 1:
        yield request
        return

    def on_signal(number: int, _: Any) -> None:
        request.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _complain(error: Exception | str) -> None:
    # One line, whatever file name or value of the user's it quotes.
    print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)


def connect(config: DistributedConfig) -> None:
    """Joins the other processes of the run if there are any (jax.distributed).

    Raises:
        ConfigError: they could not be reached in time, or JAX cannot tell from the environment who they are.
    """
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not (coordinator is not None if config.enabled is None else config.enabled):
        return
    if coordinator is not None and config.process_id:
        _wait_for(coordinator, config.timeout)
    import jax

    try:
        jax.distributed.initialize(config.coordinator, config.n_process, config.process_id, initialization_timeout=config.timeout)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"distributed: cannot join the other processes: {str(error).splitlines()[0]}") from None
    logging.getLogger(__name__).info("process %d of %d", jax.process_index(), jax.process_count())


def agreed(what: str, parts: Mapping[str, str]) -> None:
    """Returns once all processes of the run have come here, each with the same.

    It asks JAX's coordination service: a collective of the devices gives up long before another process may have its data.

    Args:
        what: is compared, for the message. Processes come here in the same order.
        parts: of it, by name.

    Raises:
        ConfigError: a process has something else, which all are told; or one has not come for a day.
    """
    import jax

    n = jax.process_count()
    if n == 1:
        return
    from jax._src import distributed  # there is no public way to its keys and values

    client, call, until = distributed.global_state.client, next(_calls), time.monotonic() + _PATIENCE
    assert client is not None

    def of(process: int) -> dict[str, str]:
        while True:
            try:  # in short waits, between which Python heeds a signal
                return json.loads(client.blocking_key_value_get(f"mutransformer/agreed/{call}/{process}", 2000))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if time.monotonic() > until:
                raise ConfigError(f"{what}: process {process} of {n} is not ready after {_PATIENCE // 3600} hours")

    client.key_value_set(f"mutransformer/agreed/{call}/{jax.process_index()}", json.dumps(dict(parts)))
    first = of(0)
    for process in range(1, n):
        other = of(process)
        differ = [name for name in first if first[name] != other.get(name)]
        if differ:
            raise ConfigError(
                f"{what} differs between process 0 and {process}: {', '.join(differ)} (process 0 has "
                f"{differ[0]} {first[differ[0]][:8]}, process {process} {other.get(differ[0], 'none')[:8]}); give all the same"
            )


def _wait_for(coordinator: str, timeout: int) -> None:
    """Returns once the coordinator listens. JAX, where it waits in vain, aborts the process with a stack trace."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(1, deadline - time.monotonic())):
                return
        except (OSError, ValueError, OverflowError) as error:
            left = deadline - time.monotonic()
            if left <= 0 or not isinstance(error, OSError):
                reason = getattr(error, "strerror", None) or str(error)
                raise ConfigError(
                    f"distributed.coordinator = {coordinator}: not reached within distributed.timeout = {timeout} s: {reason}"
                ) from None
        time.sleep(min(0.5, left))
