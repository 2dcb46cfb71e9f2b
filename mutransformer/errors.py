"""User-correctable errors, the checks that raise them, and the exit codes of the command line; what is secret in a text."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FINISHED = 0
FAILED = 1  # the run or the check itself failed: a loss that is not finite, too little memory, a verdict FAIL
USAGE_ERROR = 2  # user-correctable: a setting, an option or a file
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with a checkpoint saved; the same command resumes
STUCK = 76  # a process of the run is stuck, or gone; the same command resumes from the latest checkpoint
INTERRUPTED = 130  # by Ctrl-C, with nothing saved


REDACTED = "REDACTED"  # in place of a secret
_URL = r"((?<!github)://)(?!\[)"  # github://ORGANIZATION:REPOSITORY@REVISION is no password, nor is http://[::1]:80
_SECRETS = (
    # The user and password of a URL. A key of S3 may hold slashes; a host's port, which one follows, is not a password.
    re.compile(rf"{_URL}[^\s/@]*:[^\s/][^/\n]*(?=@)"),
    re.compile(rf"{_URL}[^\s/:@]*:(?!\d*(?:/|$))(?:(?!://)[^\s@])*(?=@)"),
    re.compile(r"(https?://)[^\s/@]+(?=@)", re.IGNORECASE),
    # A value of a query, by its name.
    re.compile(
        r"([?&;#][^\s=&;#?]*(?:token|secret|passw|passphrase|pwd|key|credential|auth(?!or)|session|jwt|\bsig|[-_]sig|\b(?:code|pass)\b)"
        r"[^\s=&;#?]*=)[^\s&#]*(?:[^\s&#'\"\]):;,]|(?=[&#]))",  # what follows a text in a message is left
        re.IGNORECASE,
    ),
    # An access token of the Hugging Face Hub.
    re.compile(r"(\bhf_)(?:[A-Za-z0-9]{16,}|(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{10,})"),
)


def redact(value: Any) -> Any:
    """A text without the passwords, access tokens and other secrets that URLs in it hold, also within dicts, lists and tuples.

    For all that is printed, logged or stored.
    """
    if isinstance(value, str):
        for secret in _SECRETS if "://" in value or "=" in value or "hf_" in value else ():
            value = secret.sub(rf"\g<1>{REDACTED}", value)
        return value
    if isinstance(value, dict):
        return {redact(key): redact(one) for key, one in value.items()}
    return type(value)(map(redact, value)) if type(value) in (list, tuple) else value


class ConfigError(ValueError):
    """A user-correctable error, in one line that names the key, its value and what would be right. Secrets are redacted."""

    def __init__(self, message: object):
        super().__init__(redact(str(message)))


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
