"""Empirical tests of a parametrization: coordinate checks, hyperparameter sweeps, and reports with verdicts."""

from dataclasses import dataclass
from typing import Literal


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
