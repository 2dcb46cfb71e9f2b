"""User-correctable errors, the checks that raise them, and the exit codes of the command line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FINISHED = 0
FAILED = 1  # the run or the check itself failed: a loss that is not finite, too little memory, a verdict FAIL
USAGE_ERROR = 2  # user-correctable: a setting, an option or a file
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with a checkpoint saved; the same command resumes
STUCK = 76  # a process of the run is stuck, or gone; the same command resumes from the latest checkpoint
INTERRUPTED = 130  # by Ctrl-C, with nothing saved


class ConfigError(ValueError):
    """A user-correctable error, in one line that names the key, its value and what would be right."""


def check(ok: bool, message: str) -> None:
    """Raises ConfigError(message) unless ok."""
    if not ok:
        raise ConfigError(message)


def is_url(path: str) -> bool:
    """Whether a path is a URL that fsspec opens, such as gs://bucket/folder."""
    return "://" in path


def check_path(key: str, path: str, urls: bool = False) -> None:
    """Raises ConfigError if a setting's value cannot be a path (it need not exist), is a URL where `urls` does not allow one, or
    names the home of an unknown user."""
    check("\0" not in path, f"{key} = {path!r}: must be a path, without null characters")
    if is_url(path):
        check(urls, f"{key} = {path}: must be a local path, not a URL")
        return
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key} = {path}: there is no such user") from None


def first_line(error: BaseException) -> str:
    """The message of an error in one line: an OSError's reason, else the first line, else the name of its class."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def translate_errors(
    prefix: str,
    kinds: type[Exception] | tuple[type[Exception], ...] = Exception,
    describe: Callable[[BaseException], str] = first_line,
) -> Iterator[None]:
    """Turns errors of these kinds into ConfigError("prefix: description"), or without a prefix. A ConfigError passes."""
    try:
        yield
    except ConfigError:
        raise
    except kinds as error:
        raise ConfigError(f"{prefix}: {describe(error)}" if prefix else describe(error)) from error
