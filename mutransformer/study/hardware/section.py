"""What a section of the report is given, and what it gives."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutransformer.config.load import load
from mutransformer.config.schema import Config

Result = dict[str, Any]  # plain data for report.json


class SectionFailed(Exception):
    """A section ran to its end, and what it found is wrong."""


def nothing(text: str) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class Task:
    """What a section is given besides its sizes.

    A section is a generator of its results so far: what it gave last is kept, whatever ends it.
    """

    folder: Path  # the report's, which exists
    settings: tuple[str, ...] = ()  # the user's, for every config of the section
    deadline: float = float("inf")  # by time.monotonic(), which the processes of a machine share: the section's is ended then
    scratch: Path | None = None  # for files that do not stay; None: the folder
    say: Callable[[str], None] = nothing  # shows a line of progress

    def config(self, settings: Sequence[str], *more: str) -> Config:
        """A config of the section with the user's settings."""
        return load([*settings, *more, *self.settings])

    def too_late_for(self, seconds: float, because: str) -> str | None:
        """Why what may take so many seconds is left out, with what the estimate rests on; None if that much time is left."""
        left = self.deadline - time.monotonic()
        return f"{left:.0f} s are left, and {because}" if seconds > left else None


_FOLDERS = re.compile(r"(?<![\w)>~/.\]])~?/(?:[\w.+@-]+/)+")


def without_folders(text: str) -> str:
    """A text in which each absolute path is only its last name: a report goes to other people."""
    return _FOLDERS.sub("", text)
