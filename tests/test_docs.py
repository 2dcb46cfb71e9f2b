"""The docs are true: their commands parse, and the settings, files, links and names in them exist."""

import ast
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import CHANGES, LAUNCH, PAGES, README, SET, blocks
from short_runs import ROOT
from test_layers import FLOORS

import mutransformer
from mutransformer import cli
from mutransformer.config import load as settings
from mutransformer.config.schema import Config, all_settings
from mutransformer.errors import ConfigError


def commands(page: Path) -> list[str]:
    """The command lines `mutransformer ...` and `python scripts/...` in the shell blocks, as they are written."""
    lines = "\n".join(code for _, code in blocks(page)).replace("\\\n", " ").splitlines()
    written = re.compile(r"(?<![\w/'\"=.*])(mutransformer [a-z]|python (-u )?scripts/).*")
    return [found[0] for line in lines if (found := written.search(line))]


def resolve(command: str, monkeypatch: pytest.MonkeyPatch) -> Config | None:
    """Has the program's own parser read a command, and `settings.load` its settings; None if it takes none."""
    words = shlex.split(re.sub(r"\$(\w+)", lambda m: {**SET, "SHARED": "/shared"}[m[1]], command), comments=True)

    class Parsed(Exception):
        pass

    def stopping(method: str) -> Any:
        real = getattr(ArgumentParser, method)

        def parse(self: ArgumentParser, *args: Any) -> None:
            raise Parsed(real(self, *args))

        return parse

    with monkeypatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(ArgumentParser, method, stopping(method))
        patch.chdir(ROOT)
        try:
            code = None
            if words[0] == "mutransformer":
                code = cli.main(words[1:])
            else:
                script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
                patch.setattr(sys, "argv", words[script:])
                runpy.run_path(words[script], run_name="__main__")
        except Parsed as parsed:
            (options,) = parsed.args
        except SystemExit as ended:
            assert ended.code == 0 and {"--help", "--help-config"} & set(words), f"{command}: exit code {ended.code}"
            return None
        else:
            raise AssertionError(f"{command}: exit code {code}, it reads no command line")
        if not hasattr(options, "settings"):
            return None
        future = re.compile(r"runs/\w+(/config.yaml)?$")  # of a run that is yet to come
        return settings.load([arg for arg in options.settings if not future.fullmatch(arg)])


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}), ids=lambda c: c[:40])
def test_commands_resolve(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(command, monkeypatch)


@pytest.mark.parametrize(
    "command, error",
    [
        ("mutransformer train small optim.learning_rate=1", ConfigError),
        ("mutransformer trian small", AssertionError),
        ("mutransformer sweep small --width 64 --lrs 0.1 --typo", AssertionError),
        ("python scripts/train.py configs/smal.yaml", ConfigError),
        ("python scripts/prepare_data.py configs/small.yaml --dryrun", AssertionError),
    ],
)
def test_a_wrong_command_is_found(command: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(error):
        resolve(command, monkeypatch)


def test_commands_are_found() -> None:
    assert len(commands(README)) >= 9 and len(commands(LAUNCH)) >= 2
    assert {command.split()[0] for command in commands(README)} == {"mutransformer", "python"}
    assert all(blocks(page) for page in (README, LAUNCH, ROOT / "CONTRIBUTING.md", ROOT / "results/README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shell_blocks_parse(page: Path) -> None:
    for heading, code in blocks(page):
        done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, f"{heading}: {done.stderr}"


@pytest.mark.parametrize("script", ["scripts/tpu_vm_setup.sh", "docs/slurm.sbatch", "tests/stand_in.sh", ".ci/run", ".ci/newest"])
def test_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def anchors(page: Path) -> set[str]:
    """The fragments by which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, fragment = link.partition("#")
            target = page.parent / path if path else page
            assert link.startswith("https://") or target.exists(), f"{page.name}: {link}"
            assert link.startswith("https://") or not fragment or fragment in anchors(target), f"{page.name}: {link}"


def test_paths_exist() -> None:
    """Every file of the repository that a page names, except in the list of old names."""
    places = re.compile(r"`((?:mutransformer|tests|configs|scripts|docs)/[\w./-]*)`")
    named = {path for page in PAGES if page != CHANGES for path in places.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 20 and not [path for path in sorted(named) if not (ROOT / path).exists()]
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("|---|---|")[2]
    inner = set(re.findall(r"`([\w/]+(?:\.py|/))`", table))
    assert len(inner) > 20 and not [path for path in sorted(inner) if not (ROOT / "mutransformer" / path).exists()]


def unknown_keys(text: str) -> set[str]:
    sections = "model|data|optim|precision|mesh|distributed|eval|log|checkpoint|profile"
    found = re.findall(rf"(?<![\w/.-])(?:{sections})\.[a-z_0-9]+(?:\.[a-z]+)?(?![\w(/])", text)
    named = {re.sub(r"^(data.sources|eval.sets)\.\w+$", r"\1", key) for key in found}  # a group below it has a name of its own
    return {key for key in named if not key.endswith((".md", ".py", ".sources"))} - all_settings().keys()


def test_settings_exist() -> None:
    assert unknown_keys("set `optim.learning_rate=1`") == {"optim.learning_rate"} and not unknown_keys("`optim.lr`")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page == CHANGES:  # the second column of a row
            text = "\n".join(row.split("|")[2] for row in text.splitlines() if row.startswith("| `"))
        assert not unknown_keys(text), page.name


def renamed() -> list[str]:
    """The old names of settings and weights, as CHANGELOG lists them."""
    settings_, weights = (
        re.findall(r"`([\w.]+)`", "\n".join(row.split("|")[1] for row in part.splitlines() if row.startswith("| `")))
        for part in re.split(r"^### .*$", CHANGES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:3]
    )
    return [name for name in (*settings_, *weights) if name != "eval.checkpoint"]


TEXT = {".py", ".md", ".yaml", ".sh", ".json", ".jsonl", ".csv", ".txt"}
# The error that maps old names, its tests, and the reference system's own names.
MAY_NAME_OLD = {"mutransformer/config/load.py", "tests/test_config.py", "tests/test_bad_input.py", "tests/reference.py"}


def test_the_error_and_the_changelog_rename_alike() -> None:
    section = CHANGES.read_text(encoding="utf-8").partition("### Renamed settings")[2].partition("###")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)`", section, re.MULTILINE)
    assert rows and dict(rows) == {old: new.split()[0] for old, new in settings.RENAMED.items()}


def test_old_names_are_gone() -> None:
    names = renamed()
    assert len(names) == 27
    old = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, names))})\b")
    for folder in ("mutransformer", "scripts", "tests", "configs", "docs", "results"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in TEXT and path.relative_to(ROOT).as_posix() not in MAY_NAME_OLD:
                found = old.search(path.read_text(encoding="utf-8"))
                assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}"


def test_the_readme_answers_by_file_name() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for name in ("mup/rules.py", "model/transformer.py", "sharding/collectives.py", "data/batches/", "training/checkpoint.py"):
        assert f"`mutransformer/{name}`" in text
    assert "`mutransformer/training/optim.py`" in text
    first = text.partition("## Install")[0]
    assert "No TPU has run it yet" in first and "0.12 to 0.16 nats" in first


def test_the_floors_are_those_of_the_imports() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    written = re.search(r"From the ground up: ([^.]*)\.", text)
    assert written and re.findall(r"`(\w+)`", written[1]) == FLOORS
    drawn = re.findall(r'font-size="15" font-weight="bold" [^>]*>(\w+)<', (ROOT / "docs/house.svg").read_text(encoding="utf-8"))
    assert drawn == ["mutransformer", *reversed(FLOORS)]


def test_the_python_example_names_what_exists() -> None:
    ((_, code),) = blocks(README, "python")
    used = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert used and not [name for name in sorted(used) if not hasattr(mutransformer, name)]


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    ((_, code),) = blocks(README, "python")
    shorter = code.replace('"steps=20"', '"steps=2", "eval.batches=1", "eval.final_batches=1"')
    assert shorter != code
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", shorter], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def test_the_diffs_apply_to_the_code() -> None:
    """Every line that a diff in CONTRIBUTING keeps or removes is in the package."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "mutransformer").rglob("*.py")))
    lines = [line for _, block in blocks(ROOT / "CONTRIBUTING.md", "diff") for line in block.splitlines()]
    kept = [line[1:].removesuffix("...").strip() for line in lines if line[0] in " -"]
    assert len(kept) >= 10 and not [line for line in kept if line not in code]


def test_the_example_imports_what_exists() -> None:
    ((_, code),) = blocks(ROOT / "CONTRIBUTING.md", "python")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mutransformer"):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


def test_citation_and_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software") and cited["message"] and cited["title"]
    assert cited["authors"] == [{"name": "The mutransformer contributors"}]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


def test_hooks_are_local() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    assert [hook["id"] for hook in hooks["repos"][0]["hooks"]] == ["ruff-check", "ruff-format", "pyright"]
