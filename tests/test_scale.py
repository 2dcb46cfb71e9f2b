"""The committed tables of results/scale and results/scale_gpu match the committed plans, and one command makes all of them."""

import copy
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mutransformer import cli
from mutransformer.config.load import load
from mutransformer.errors import ConfigError

ROOT = Path(__file__).parents[1]
script: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "scale_report.py"))
main: Any = script["main"]
FOLDERS = {name: ROOT / "results" / name for name in ("scale", "scale_gpu")}


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


# All of it made again


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_cases_are_those_of_the_plans(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan says of itself is what its arguments ask for."""
    monkeypatch.chdir(ROOT)
    plans, cases = script["read"](FOLDERS[folder]), script["cases"](FOLDERS[folder])
    assert plans.keys() == cases.keys()
    said = {name: _identity(plan) for name, plan in plans.items()}
    for name, arguments in cases.items():
        args = cli.command_parser("plan").parse_intermixed_args(arguments)
        config = load(args.settings)
        x, y = (int(size.partition("=")[2]) for size in args.mesh.split(",")) if args.mesh else (1, 1)
        asked = config.name, config.model.remat, config.tokens_per_step, config.optim.grad_accumulation_steps or 1, x, y
        assert args.compile and args.json and (*asked, args.topology.partition(":")[0]) == said[name], name
    assert len(set(map(tuple, cases.values()))) == len(cases)


def _identity(plan: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("name", "remat", "tokens_per_step", "grad_accumulation_steps")
    return *(plan[key] for key in keys), plan["mesh"]["x"], plan["mesh"]["y"], plan["topology"].partition(":")[0]


def small_folder(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Three cases of results/scale, with plans of two of them, and one plan that is no case any more."""
    names, plans = ["v5p-64x1-t256", "v5p-16x4-t256", "v5e-8x8-t256"], script["read"](FOLDERS["scale"])
    (tmp_path / "cases.yaml").write_text("".join(f"{name}: small --topology v5p:4x4x4\n" for name in names))
    for name in (*names[:2], "v5p-wide-64x8"):
        (tmp_path / f"{name}.json").write_text(json.dumps(plans[name]))
    return tmp_path, plans


def test_an_interruption_keeps_the_old_plans_and_what_was_made(tmp_path: Path) -> None:
    folder, plans = small_folder(tmp_path)
    before = {path.name: path.read_text() for path in folder.glob("*.json")}
    made: list[str] = []

    def make(name: str, arguments: Sequence[str]) -> str:
        assert arguments[-2:] == ["--compile", "--json"]
        made.append(name)
        if len(made) == 2:
            raise ConfigError("stopped")
        plan = copy.deepcopy(plans[name])
        plan["compiled"]["costings"]["hybrid"]["step_seconds"] = 0.125
        return json.dumps(plan)

    with pytest.raises(ConfigError, match="stopped"):
        script["compile_all"](folder, make=make)
    assert {path.name: path.read_text() for path in folder.glob("*.json")} == before
    script["compile_all"](folder, make=make)
    assert made == ["v5p-64x1-t256", "v5p-16x4-t256", "v5p-16x4-t256", "v5e-8x8-t256"]
    new = script["read"](folder)
    assert list(new) == sorted(["v5p-64x1-t256", "v5p-16x4-t256", "v5e-8x8-t256"]) and not (folder / "unfinished").exists()
    assert {script["_seconds"](plan) for plan in new.values()} == {0.125}


def test_what_other_cases_have_left_is_made_again(tmp_path: Path) -> None:
    folder, plans = small_folder(tmp_path)
    made: list[str] = []

    def make(name: str, arguments: Sequence[str]) -> str:
        made.append(name)
        return json.dumps(plans[name])

    script["compile_all"](folder, ["v5p-64x1-t256"], make)
    script["compile_all"](folder, ["v5p-64x1-t256"], make)
    assert made == ["v5p-64x1-t256"] and (folder / "v5p-wide-64x8.json").exists()
    cases = folder / "cases.yaml"
    cases.write_text(cases.read_text().replace("small", "medium"))
    script["compile_all"](folder, ["v5p-64x1-t256"], make)
    assert len(made) == 2
    with pytest.raises(ConfigError, match="--only: cases.yaml has no nothing"):
        script["compile_all"](folder, ["nothing"], make)


def test_the_numbers_of_the_pages_are_those_of_the_plans() -> None:
    """Rewriting the pages changes nothing; with other plans it changes every row that quotes them, and nothing else."""
    plans = script["read"](FOLDERS["scale"])
    made = script["table"](plans, FOLDERS["scale"])
    pages = {page: (ROOT / page).read_text(encoding="utf-8") for page in script["PAGES"]}
    for text in pages.values():
        assert script["rewrite"](text, plans, made) == text
    other = copy.deepcopy(plans)
    for plan in other.values():
        plan["compiled"]["costings"]["hybrid"]["step_seconds"] += 1
    changed = {page: script["rewrite"](text, other, script["table"](other, FOLDERS["scale"])) for page, text in pages.items()}
    rows = {
        page: [new for old, new in zip(text.split("\n"), changed[page].split("\n"), strict=True) if old != new]
        for page, text in pages.items()
    }
    assert len(rows["docs/performance.md"]) == len(script["ROWS"])
    assert len(rows["results/README.md"]) == len(plans) + len(script["SETTINGS"])
    assert any("1.381 (77 %)" in row for row in rows["docs/performance.md"])


def test_a_failed_plan_is_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "cases.yaml").write_text("one: small --topology v5p:1x2x3\n")
    assert main([str(tmp_path), "--compile"]) == 2
    assert "error: one: --topology v5p:1x2x3: v5p has no such slice" in capsys.readouterr().err
    assert main([str(tmp_path), "--only", "one"]) == 2
    assert capsys.readouterr().err == "error: --only: needs --compile\n"
    (tmp_path / "cases.yaml").unlink()
    assert main([str(tmp_path), "--compile"]) == 2
    assert "has no cases.yaml" in capsys.readouterr().err
