"""The committed tables of results/scale and results/scale_gpu match the committed plans."""

import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
main: Any = runpy.run_path(str(ROOT / "scripts" / "scale_report.py"))["main"]


@pytest.mark.parametrize("folder", ["scale", "scale_gpu"])
def test_the_committed_table_matches_the_plans(folder: str, capsys: Any) -> None:
    assert main([str(ROOT / "results" / folder)]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + len(list((ROOT / "results" / folder).glob("*.json")))
    assert table in (ROOT / "results" / "README.md").read_text(encoding="utf-8")


def test_the_options_that_were_tried_are_options_of_this_xla() -> None:
    """XLA parses options of all devices alike, also where it compiles for a CPU."""
    plans = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results" / "scale_gpu").glob("*.json")]
    options = {name: value for plan in plans for name, value in plan["execution"]["xla_options"].items()}
    assert len(options) == 4
    assert jax.jit(lambda: jnp.ones(()), compiler_options=options)() == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        jax.jit(lambda: jnp.ones(()), compiler_options={"xla_gpu_no_such_option": "True"})()


def test_a_folder_without_plans_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: contains no .json of plan.py --compile --json\n"
