"""What a check concludes, and the error of a check that cannot be made."""

from collections.abc import Iterable
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
    """One line of a result. UNKNOWN: what was measured does not determine it. `passed` says which of them decide."""

    outcome: Literal["PASS", "FAIL", "UNKNOWN", "CONTROL", "WARNING"]
    text: str

    def __str__(self) -> str:
        return f"{self.outcome:<7} {self.text}"


def passed(verdicts: Iterable[Verdict]) -> bool:
    """Whether something passes, and nothing fails or is unknown."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return "PASS" in outcomes and not outcomes & {"FAIL", "UNKNOWN"}


def count(n: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
