"""The committed table of results/scale matches the committed plans."""

import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
main: Any = runpy.run_path(str(ROOT / "scripts" / "scale_report.py"))["main"]


def test_the_committed_table_matches_the_plans(capsys: Any) -> None:
    assert main([str(ROOT / "results" / "scale")]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + len(list((ROOT / "results" / "scale").glob("*.json")))
    assert table in (ROOT / "results" / "README.md").read_text(encoding="utf-8")


def test_a_folder_without_plans_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: contains no .json of plan.py --compile --json\n"
