"""The command line: commands and their help, config names, exit codes, one-line errors, scripts, and what a wheel holds."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from mutransformer import cli
from mutransformer.config import load as load_module
from mutransformer.config.load import describe, load, shipped_configs
from mutransformer.errors import FAILED, FINISHED, INTERRUPTED, USAGE_ERROR, ConfigError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = {name.replace("-", "_"): name for name in cli.COMMANDS if name != "report"} | {"transfer_report": "report"}


@pytest.fixture(autouse=True)
def terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def ends(capsys) -> Callable[..., tuple[Any, str, str]]:
    """Runs a command line that argparse ends; gives exit code, standard output and standard error."""

    def run(*args: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(args)
        return ended.value.code, *capsys.readouterr()

    return run


# Help


def test_without_arguments_it_lists_the_commands(ends, capsys):
    assert cli.main([]) == FINISHED
    listed = capsys.readouterr().out
    assert re.findall(r"^  ([a-z-]+) +[A-Z].*\.$", listed, re.MULTILINE) == list(cli.COMMANDS)
    assert ends("--help") == (0, listed, "")
    assert ends("--version")[1].strip() == PROJECT["project"]["version"]


def test_every_module_of_commands_is_a_command():
    modules = {path.stem.replace("_", "-") for path in (ROOT / "mutransformer/commands").glob("[!_]*.py")}
    assert modules == set(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command(name, ends):
    code, out, err = ends(name, "--help")
    assert code == 0 and not err
    example = shlex.split(out.splitlines()[0].removeprefix("usage: mutransformer "))
    assert example[0] == name and len(out.splitlines()) < 75
    args = cli.command_parser(name).parse_intermixed_args(example[1:])
    if name == "report":
        assert "most used settings" not in out
    else:
        load([arg for arg in args.settings if not arg.startswith("runs/")])  # of a future run
        lines = out.split("most used settings")[1].splitlines()[1:]
        keys = [line for line in lines if not line.startswith(" " * 10)]
        assert 4 <= len(keys) <= 14 and all(" = " in key for key in keys) and max(map(len, lines)) < 80


def test_the_help_shows_the_choices_of_a_setting(ends):
    out = ends("train", "--help")[1]
    assert "[sp | mup | abs_mup | mup_table8 | completep | completed_p]" in " ".join(out.split())


def test_a_bare_train_lists_the_configs(capsys):
    assert cli.main(["train"]) == USAGE_ERROR
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: train needs a config") and max(map(len, err.splitlines())) < 80
    listed = re.findall(r"^  (\S+) +\S.*", err, re.MULTILINE)
    assert listed == [name for name in shipped_configs() if not name.startswith("presets/")] and "small" in listed


@pytest.mark.parametrize(
    ("arg", "key"),
    [
        ("lr=0.1", "optim.lr"),
        ("layers=3", "model.n_layer or log.layers"),
        ("width=64", "model.d_model"),
        ("optim.larning_rat=1", None),
    ],
)
def test_a_setting_that_may_be_meant_is_named(arg, key, capsys):
    assert cli.main(["train", "small", arg]) == USAGE_ERROR
    hint = f"; did you mean {key}?" if key else ""
    assert capsys.readouterr().err == f"error: {arg.partition('=')[0]}: no such key{hint}\n"


def test_the_reference_of_the_settings(ends):
    assert ends("train", "--help-config") == (0, describe() + "\n", "")
    code, out, _ = ends("sweep", "--help-config", "optim")  # though --widths is missing
    assert code == 0 and out == describe("optim") + "\n" and len(out) < len(describe()) / 2
    assert cli.main(["train", "--help-config", "optm"]) == USAGE_ERROR


# Mistakes


MEANT = "no such option; settings are written KEY=VALUE: did you mean optim.lr=0.1?"
LR_AS_OPTION = (["--lr", "0.1"], ["--lr=0.1"], ["--optim.lr", "0.1"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "trian: no such command; did you mean train?; see mutransformer --help"),
        (["nothing"], "nothing: no such command; see mutransformer --help"),
        (["--nothing"], "unrecognized arguments: --nothing; see mutransformer --help"),
        (["train", "--nothing"], "unrecognized arguments: --nothing; see mutransformer train --help"),
        *((["train", "small", *args], f"{' '.join(args)}: {MEANT}; see mutransformer train --help") for args in LR_AS_OPTION),
        (["train", "--lr"], f"--lr: {MEANT.replace('0.1', '...')}; see mutransformer train --help"),
        (["report", "a", "--seq-len", "1"], "unrecognized arguments: --seq-len 1; see mutransformer report --help"),
        (["sweep"], "the following arguments are required: --lrs; see mutransformer sweep --help"),
        (["inspect-data", "--rows", "x"], "argument --rows: invalid int value: 'x'; see mutransformer inspect-data --help"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(args, message, ends):
    assert ends(*args) == (USAGE_ERROR, "", f"error: {message}\n")


@pytest.mark.parametrize("arg", ["model.d_modle=3", "steps=0", "none.yaml", "seed=1\nsteps=2", "a\nb.yaml", "smal"])
def test_a_mistake_in_the_settings_is_one_line(arg, capsys):
    for command in (["train"], ["plan"], ["sweep", "--widths", "64", "--lrs", "0.1"]):
        assert cli.main([*command, arg]) == USAGE_ERROR == 2
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch("error: .+\n", err)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FloatingPointError("step 3: the loss is nan"), FAILED, "step 3: the loss is nan"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nat ..."),
            FAILED,
            "RESOURCE_EXHAUSTED: Out of memory; less memory is .*",
        ),
        (OSError(28, "No space left on device", "/a\nb"), USAGE_ERROR, "/a b: No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), USAGE_ERROR, ".*Broken pipe"),
        (ConfigError("steps = 0: must be\nat least 1"), USAGE_ERROR, "steps = 0: must be at least 1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_is_no_fault_of_ours_is_one_line(error, code, line, capsys):
    def broken() -> int:
        raise error

    assert cli.run_cli(broken) == code
    assert re.fullmatch(f"error: {line}\n", capsys.readouterr().err)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug")])
def test_a_fault_of_ours_keeps_its_traceback(error):
    def broken() -> int:
        raise error

    with pytest.raises(type(error), match="a bug"):
        cli.run_cli(broken)


def test_the_exit_code_is_the_commands(monkeypatch):
    assert cli.run_cli(lambda: 75) == 75
    monkeypatch.setattr("mutransformer.commands.train.run", lambda args: len(args.settings))
    assert cli.main(["train", "small", "steps=3"]) == 2


# Configs by name


def test_configs_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    configs = ROOT / "configs"
    assert set(shipped_configs()) == {str(p.relative_to(configs))[:-5] for p in configs.rglob("*.yaml")} >= {"paper/width128"}
    for name in ("small", "paper/width128"):
        assert load([name, "steps=3"]) == load([str(configs / f"{name}.yaml"), "steps=3"])
    Path("small").write_text("steps: 7")
    assert load(["small"]).steps == 7, "an existing file wins"
    Path("medium").mkdir()
    assert load(["medium"]) == load([str(configs / "medium.yaml")]), "a folder does not"


@pytest.mark.parametrize("args", [[], ["configs/small.yaml"], ["small"], ["paper/width512", "name=run", "optim.lr=1e-3"]])
def test_print_config_prints_what_loads_as_the_same(args, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["train", "--print-config", *args]) == FINISHED
    (path := tmp_path / "other-name.yaml").write_text(capsys.readouterr().out)
    assert load([str(path)]) == load(args)


def test_configs_of_an_installed_wheel(tmp_path, monkeypatch):
    """By the wheel's list of files, or beside the package, as `pip install --target` puts them."""
    site = tmp_path / "lib/site-packages"
    monkeypatch.setattr(load_module, "__file__", str(site / "mutransformer/config/load.py"))
    monkeypatch.setattr(sys, "path", [str(site)])
    find = shipped_configs.__wrapped__
    assert find() == {}
    for share in (site / "share/mutransformer/configs", tmp_path / "share/mutransformer/configs"):
        (share / "paper").mkdir(parents=True)
        for name in ("small", "paper/width128"):
            (share / f"{name}.yaml").touch()
        assert {name: path.resolve() for name, path in find().items()} == {
            name: share / f"{name}.yaml" for name in ("paper/width128", "small")
        }
        if site in share.parents:
            info = site / "mutransformer-0.1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mutransformer\nVersion: 0.1.0\n")
            (info / "RECORD").write_text("../../share/mutransformer/configs/small.yaml,,\n")


def test_the_project_ships_every_config():
    patterns = [pattern for found in PROJECT["tool"]["setuptools"]["data-files"].values() for pattern in found]
    assert {path for pattern in patterns for path in ROOT.glob(pattern)} == set((ROOT / "configs").rglob("*.yaml"))
    for folder, (pattern,) in PROJECT["tool"]["setuptools"]["data-files"].items():
        assert folder == f"share/mutransformer/{Path(pattern).parent}"


@pytest.mark.slow
def test_a_wheel_holds_the_configs_and_the_command(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "mutransformer", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheel"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and re.search("No matching distribution|Could not find a version|connection", done.stderr):
        pytest.skip("the build needs setuptools, which cannot be had here")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        name.partition("share/mutransformer/configs/")[2].removesuffix(".yaml") for name in names if name.endswith(".yaml")
    }
    assert shipped == set(shipped_configs()) and "mutransformer/commands/train.py" in names
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "mutransformer = mutransformer.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


# The program as it is started


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_the_command(script, monkeypatch):
    called = []
    monkeypatch.setattr(cli, "main", lambda argv: called.append(argv) or 7)
    monkeypatch.setattr(sys, "argv", ["script.py", "small", "--x", "y=1"])
    path = ROOT / f"scripts/{script}.py"
    with pytest.raises(SystemExit, match="^7$"):
        runpy.run_path(str(path), run_name="__main__")
    assert called == [[SCRIPTS[script], "small", "--x", "y=1"]] and len(path.read_text().splitlines()) < 10


def test_there_is_no_other_way_in():
    assert PROJECT["project"]["scripts"] == {"mutransformer": "mutransformer.cli:main"}
    others = {path.stem for path in (ROOT / "scripts").glob("*.py")} - SCRIPTS.keys()
    assert others == {"benchmark_data", "coord_check_power", "scale_report"}


@pytest.mark.parametrize("start", [["-m", "mutransformer", "train"], [str(ROOT / "scripts/train.py")]])
def test_a_mistake_is_reported_where_jax_cannot_be_imported(start, tmp_path):
    """Nor NumPy: each would take longer than the answer."""
    for name in ("jax", "numpy", "grain"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    for args, code in ((["steps=0"], 2), (["--help"], 0), (["small", "--print-config"], 0)):
        done = subprocess.run([sys.executable, *start, *args], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=50)
        assert done.returncode == code, done.stderr
    assert "name: small" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_what_the_terminal_cannot_show_is_escaped(encoding, tmp_path):
    command = [sys.executable, "-m", "mutransformer", "train"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    shown = subprocess.run([*command, "name=中é", "--print-config"], cwd=ROOT, env=env, capture_output=True)
    assert shown.returncode == FINISHED and not shown.stderr
    assert (b"name: \\u4e2d\xe9\n" if encoding == "latin-1" else b"name: \\u4e2d\\xe9\n") in shown.stdout
    wrong = subprocess.run([*command, "中é.yaml"], cwd=ROOT, env=env, capture_output=True)
    assert wrong.returncode == USAGE_ERROR and wrong.stderr.startswith(b"error: ") and wrong.stderr.count(b"\n") == 1


def test_a_source_tree_needs_no_installation(monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    made = runpy.run_path(str(ROOT / "mutransformer/__init__.py"))
    assert made["__version__"] == PROJECT["project"]["version"]
