"""From a command line to a function of a Config: arguments, help, one-line errors, and jax.distributed."""

import inspect
import logging
import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

from mutransformer import config as settings
from mutransformer.config import Config, ConfigError, DistributedConfig

MISTAKE = 2  # exit code for what the user can mend
FAILED = 1


def launch(main: Callable[[Config], int], description: str, argv: Sequence[str] | None = None) -> int:
    """Reads a config from the command line and calls main with it, once all processes of the run have met.

    Args:
        main: gets the config, returns the exit code; imports JAX itself, so that a mistake in a YAML is told before JAX starts.
        description: for --help.
        argv: None for the command line.

    Returns:
        The exit code: main's, MISTAKE for a ConfigError, FAILED for a loss that is not finite.
    """
    parser = ArgumentParser(
        description=description,
        epilog="settings and their defaults:\n\n" + describe(),
        formatter_class=RawDescriptionHelpFormatter,
        usage="%(prog)s [--print-config] [FILE.yaml ...] [key=value ...]",
    )
    parser.add_argument("args", nargs="*", metavar="FILE.yaml | key=value", help="merged left to right over the defaults")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and exit")
    given = parser.parse_args(argv)
    try:
        config = settings.load(given.args)
        if given.print_config:
            print(settings.to_yaml(config), end="")
            return 0
        connect(config.distributed)
        from mutransformer.hardware import keep_freed_memory

        keep_freed_memory()
        return main(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def connect(config: DistributedConfig) -> None:
    """Joins the other processes of the run if there are any (jax.distributed).

    Raises:
        ConfigError: they could not be reached in time, or JAX cannot tell from the environment who they are.
    """
    import jax

    told = config.coordinator is not None or "JAX_COORDINATOR_ADDRESS" in os.environ
    if not (told if config.enabled is None else config.enabled):
        return
    try:
        jax.distributed.initialize(config.coordinator, config.n_process, config.process_id, initialization_timeout=config.timeout)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"distributed: cannot join the other processes: {str(error).splitlines()[0]}") from None
    logging.getLogger(__name__).info("process %d of %d", jax.process_index(), jax.process_count())


def describe() -> str:
    """Every setting with its default and its comment, as they stand in the source."""
    lines = []
    for section in (Config, *(f for f in vars(settings).values() if inspect.isclass(f) and f.__name__.endswith("Config"))):
        if section is Config and lines:
            continue
        prefix = "" if section is Config else section.__name__.removesuffix("Config").lower() + "."
        for line in inspect.getsource(section).splitlines():
            if found := re.match(r"    (\w+): [^=]+ = (?!field\(default_factory=\w+Config)(.*?)(?:  # (.*))?$", line):
                name, default, comment = found.groups()
                default = default.replace("field(default_factory=list)", "[]").replace("None", "null").strip('"')
                lines.append(f"  {prefix}{name} = {default}" + (f"\n      {comment}" if comment else ""))
    return "\n".join(lines)
