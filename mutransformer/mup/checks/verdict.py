"""What a check concludes, and the error of a check that cannot be made."""

from dataclasses import dataclass
from typing import Literal


class CheckError(ValueError):
    """There is nothing to judge, or what was measured does not fit together."""


def require(ok: bool, message: str) -> None:
    """Raises CheckError(message) unless ok."""
    if not ok:
        raise CheckError(message)


@dataclass(frozen=True)
class Verdict:
    """One line of a result. Only PASS and FAIL decide the exit code."""

    outcome: Literal["PASS", "FAIL", "CONTROL", "WARNING"]
    text: str

    def __str__(self) -> str:
        return f"{self.outcome:<7} {self.text}"


def count(n: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{n} {noun}" + "s" * (n != 1)
