"""The cases of a parametrized test, most of them slow."""

from collections.abc import Sequence
from typing import Any

import pytest


def slow_unless(few: Sequence[tuple[Any, ...]], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The cases, of which those outside `few` need --slow."""
    assert all(case in cases for case in few), "each of the few is one of the cases"
    return [case if case in few else pytest.param(*case, marks=pytest.mark.slow) for case in cases]
