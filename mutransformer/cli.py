"""The command line: `mutransformer COMMAND ...`, or `python -m mutransformer COMMAND ...`.

A command is a module of mutransformer.commands, imported when it is called. A mistake ends with one line on standard error and an
exit code of mutransformer.errors, before JAX starts if it can be known by then.
"""

import difflib
import errno
import importlib
import io
import os
import shutil
import sys
import textwrap
from argparse import Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, NoReturn, get_origin

import mutransformer
from mutransformer.config.load import describe, load, shipped_configs, similar_keys, to_yaml
from mutransformer.config.schema import all_settings
from mutransformer.config.setting import to_text, type_name
from mutransformer.errors import FAILED, FINISHED, INTERRUPTED, STOPPED, USAGE_ERROR, ConfigError, redact
from mutransformer.sharding.processes import announce_failure
from mutransformer.sharding.stopping import Stopped

COMMANDS = ("train", "evaluate", "generate", "sweep", "report", "coord-check", "plan", "prepare-data", "inspect-data")
COMMANDS += ("train-tokenizer", "benchmark", "doctor", "export", "import")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command with its arguments (None: those of the process) and returns its exit code, or that of `run_cli`.

    Raises SystemExit for --help and --version, and for a mistake in the options.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    with lasting_output():
        return run_cli(lambda: _run(args[0], args[1:]) if args and args[0] in COMMANDS else _top_level(args))


def run_cli(run: Callable[[], int]) -> int:
    """The exit code of a function. An exception that is no fault of the program becomes one line on standard error, and a code:

    USAGE_ERROR for a ConfigError or a file that cannot be read or written; FAILED for a loss that is not finite or a device that
    is out of memory; STOPPED for a signal before there was a step to save; INTERRUPTED for a second Ctrl-C, and for one that
    nothing waits for.
    """
    try:
        with announce_failure():
            return run()
    except ConfigError as error:
        return _fail(error, USAGE_ERROR)
    except OSError as error:  # a full disk, missing permissions
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, USAGE_ERROR)
    except FloatingPointError as error:
        return _fail(error, FAILED)
    except Stopped as error:
        print(f"stopped by {error}, before the first step; the same command starts again", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:  # in a command that has nothing to save, or for the second time
        return _fail("interrupted", INTERRUPTED)
    except RuntimeError as error:  # JAX's, recognized by its text: JAX may not be imported
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        advice = "less memory is needed with a smaller data.batch_size, optim.grad_accumulation_steps, or another model.remat"
        return _fail(f"{str(error).strip().splitlines()[0]}; {advice}", FAILED)


def command_parser(name: str) -> ArgumentParser:
    """The parser of a command, with its help."""
    command = _module(name)
    summary, example, details = (command.__doc__ or "").split("\n\n", 2)
    parser = _Parser(f"mutransformer {name}", example.removeprefix("Example: "), f"{summary}\n\n{details}")
    if hasattr(command, "add_arguments"):
        command.add_arguments(parser)
    if hasattr(command, "KEYS"):
        parser.takes_settings = True
        add = parser.add_argument
        settings = "YAML files, folders of runs, shipped configs and overrides, merged left to right over the defaults; shipped: "
        add("settings", nargs="*", metavar="CONFIG | KEY=VALUE", help=settings + ", ".join(shipped_configs()))
        add("--print-config", action="store_true", help="print the resolved config as YAML and exit")
        about = "print keys, types, bounds, defaults and meanings, of all settings or those below PREFIX (optim), and exit"
        add("--help-config", nargs="?", const="", metavar="PREFIX", action=_HelpConfig, help=about)
        lines = [line for key in command.KEYS for line in _brief(key)]
        parser.epilog = "\n".join(["most used settings (all: --help-config):", *lines])
    return parser


class _Parser(ArgumentParser):
    """A parser whose help begins with an example, and whose errors are one line."""

    def __init__(self, prog: str, usage: str, description: str):
        super().__init__(prog=prog, usage=usage, description=description, formatter_class=RawDescriptionHelpFormatter)
        self.takes_settings = False

    def error(self, message: str) -> NoReturn:
        _, unknown, rest = message.partition("unrecognized arguments: ")
        if unknown and self.takes_settings and (meant := _as_setting(rest)):
            message = f"{rest}: no such option; settings are written KEY=VALUE: did you mean {meant}?"
        self.exit(USAGE_ERROR, f"error: {redact(message)}; see {self.prog} --help\n")


class _HelpConfig(Action):
    """Prints the settings below a prefix and exits, like --help whatever else is missing."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        print(describe(values))
        parser.exit()


def _as_setting(arguments: str) -> str:
    """The settings that may be meant by unknown options, such as --lr 0.1, as they are written; empty if there are none."""
    option, _, value = arguments.partition(" ")
    name, equals, given = option.lstrip("-").partition("=")
    value = given if equals else value.partition(" ")[0]
    keys = similar_keys(name.replace("-", "_")) if option.startswith("--") else []
    return " or ".join(f"{key}={value or '...'}" for key in keys)


def _brief(key: str) -> list[str]:
    """A setting with its default, its choices and its meaning, as lines of the help that fit the terminal."""
    one = all_settings()[key]
    columns = min(shutil.get_terminal_size().columns, 120) - 2
    choices = f"[{type_name(one.field.type)}] " if get_origin(one.field.type) is Literal else ""
    text = choices + textwrap.shorten(one.field.metadata["meaning"], 88, placeholder=" ...")
    title = f"  {key} = {to_text(one.default)}"
    return textwrap.wrap(text, columns, initial_indent=f"{title:32} ", subsequent_indent=" " * 33)


def _run(name: str, argv: Sequence[str]) -> int:
    args = command_parser(name).parse_intermixed_args(argv)
    if getattr(args, "print_config", False):
        print(to_yaml(load(args.settings)), end="")
        return FINISHED
    return _module(name).run(args)


def _top_level(argv: Sequence[str]) -> int:
    """Help, version, and what is no command."""
    parser = _Parser("mutransformer", "mutransformer COMMAND [--help] ...", mutransformer.__doc__ or "")
    parser.add_argument("--version", action="version", version=mutransformer.__version__)
    if argv and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        parser.error(f"{argv[0]}: no such command{'; did you mean ' + close[0] + '?' if close else ''}")
    parser.epilog = "commands:\n" + "\n".join(f"  {name:18}{(_module(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS)
    parser.parse_args(argv)
    parser.print_help()
    return FINISHED


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"mutransformer.commands.{name.replace('-', '_')}")


def _fail(error: Exception | str, code: int) -> int:
    # One line, whatever file name or value of the user's it quotes.
    print(f"error: {' '.join(redact(str(error)).splitlines())}", file=sys.stderr)
    return code


class LastingStream:
    """A text stream that drops what cannot be written: a run must not end because a terminal closed, or `| head` has enough."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Sends what is still buffered, and all that follows, to nowhere, unless the fault may pass, as that of a full disk."""
        if error.errno in (errno.EPIPE, errno.EIO):  # the reader is gone; the terminal is gone
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within it standard output and standard error are lasting streams, which escape what their encoding lacks."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(LastingStream, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
