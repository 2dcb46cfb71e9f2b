"""From a command line to a function of a Config: arguments, help, one-line errors, and jax.distributed."""

import logging
import os
import socket
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any

from mutransformer import settings
from mutransformer.config import ConfigError, DistributedConfig

MISTAKE = 2  # exit code for what the user can mend
FAILED = 1


def launch(
    main: Callable[..., int],
    description: str,
    argv: Sequence[str] | None = None,
    options: Callable[[ArgumentParser], Any] = lambda parser: None,
) -> int:
    """Reads a config from the command line and calls main with it, once all processes of the run have met.

    Args:
        main: gets the config, returns the exit code; imports JAX itself, so that a mistake in a YAML is told before JAX starts.
        description: for --help.
        argv: None for the command line.
        options: adds the script's own to the parser; main gets them by keyword.

    Returns:
        The exit code: main's; MISTAKE for a ConfigError or a file that cannot be read or written; FAILED for a loss that is not
        finite.
    """
    parser = ArgumentParser(
        description=description,
        epilog="settings and their defaults:\n\n" + settings.describe(),
        formatter_class=RawDescriptionHelpFormatter,
        usage="%(prog)s [--print-config] [FILE.yaml ...] [key=value ...]",
    )
    parser.add_argument("args", nargs="*", metavar="FILE.yaml | key=value", help="merged left to right over the defaults")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and exit")
    options(parser)
    own = vars(parser.parse_intermixed_args(argv))  # --flags may stand between settings
    args, print_config = own.pop("args"), own.pop("print_config")
    try:
        config = settings.load(args)
        if print_config:
            print(settings.to_yaml(config), end="")
            return 0
        connect(config.distributed)
        from mutransformer.hardware import keep_freed_memory

        keep_freed_memory()
        return main(config, **own)
    except ConfigError as error:
        _complain(error)
        return MISTAKE
    except OSError as error:  # the disk is full, a file is not ours to write
        _complain(ConfigError(f"{error.filename}: {error.strerror}") if error.filename else error)
        return MISTAKE
    except FloatingPointError as error:
        _complain(error)
        return FAILED


def _complain(error: Exception) -> None:
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
