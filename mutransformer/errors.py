"""What a user can mend: one exception, and the checks that raise it."""

from pathlib import Path


class ConfigError(ValueError):
    """A setting that a user can mend: one line that names the key, its value and what would be right."""


def check(ok: bool, message: str) -> None:
    """Raises ConfigError(message) unless ok."""
    if not ok:
        raise ConfigError(message)


def is_url(path: str) -> bool:
    """Whether fsspec is to be asked for it, as for gs://bucket/folder."""
    return "://" in path


def check_path(key: str, path: str, urls: bool = False) -> None:
    """Refuses what cannot be a path; a URL too, unless urls."""
    check("\0" not in path, f"{key} = {path!r}: no path")
    if is_url(path):
        check(urls, f"{key} = {path}: only local paths can be read and written so far")
        return
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key} = {path}: there is no such user") from None
