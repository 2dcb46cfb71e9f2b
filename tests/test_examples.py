"""The examples of docs/examples: models of other people's kind keep to muP, and the standard parametrization does not."""

import runpy
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from short_runs import ROOT

NAMES = ("mlp", "vit", "gru", "moe", "third_party")
# Of every weight that is not a gain or bias.
ROLES = {
    "mlp": ["input", "hidden", "hidden", "output"],
    "vit": ["input", "input", *["hidden"] * 6, "output"],
    "gru": ["input", "hidden", "hidden", "output"],
    "moe": ["input", "output", "hidden", "hidden", "output"],
    "third_party": ["input", "hidden", "output"],
}


@pytest.fixture(params=NAMES)
def example(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The names that a script defines. Other packages may rely on JAX's promotion of ranks."""
    if request.param == "third_party":
        pytest.importorskip("flowjax", reason="the example of another package needs flowjax: pip install '.[test]'")
    with jax.numpy_rank_promotion("allow"):
        yield runpy.run_path(str(ROOT / f"docs/examples/{request.param}.py"), run_name=request.param)


def test_roles(example: dict[str, Any]) -> None:
    found = [leaf.role for leaf in example["roles"]().leaves.values() if leaf.role != "vector"]
    assert found == ROLES[example["__name__"]]


def test_batches_differ_by_step_and_seed(example: dict[str, Any]) -> None:
    a, b, c, again = (jax.tree.leaves(example["batch"](*at))[0] for at in ((0, 0), (1, 0), (0, 1), (0, 0)))
    assert np.array_equal(a, again) and not np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.slow
def test_the_coordinate_check_passes_and_its_control_grows(example: dict[str, Any]) -> None:
    report = example["check"]()
    assert report.passed, str(report)


@pytest.mark.slow
def test_the_rate_transfers_and_the_standard_parametrizations_does_not(example: dict[str, Any]) -> None:
    report = example["transfer"]()
    assert report.passed, str(report)
    (control,) = (verdict.text for verdict in report.verdicts if verdict.outcome == "CONTROL")
    assert control.startswith("sp does not transfer, as expected"), str(report)
