"""Imports point only downwards, only the named modules touch disk, network or clock, and nothing runs what it has read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mutransformer"

# From the ground up: a module imports only from floors below its own.
FLOORS = [
    *({""}, {"errors"}, {"data_config", "run_config", "kernel_rules"}, {"config"}, {"settings", "spec"}),
    *({"data.cache", "data.batch"}, {"data.files"}, {"data.parts", "data.tokenize"}, {"data.hub", "data.shards", "data.splits"}),
    *({"data.sources", "data.hf_tokenizer"}, {"data.job"}, {"data.build"}, {"data.vocabulary"}, {"data.corpus"}),
    *({"data.rows"}, {"data.pipeline"}, {"data"}),
    *({"mup", "mesh", "collectives", "hardware", "flags"}, {"linear", "launch", "levers"}, {"ops", "kernels"}, {"attention"}),
    *({"model"}, {"optim"}, {"state"}, {"step"}, {"checkpoint", "metrics"}, {"evaluate", "generate"}),
    *({"plan.chips", "plan.kernels", "plan.hlo"}, {"plan.comm", "plan.loops", "plan.timing", "plan.trace", "plan.case"}),
    *({"plan.walk", "plan.estimate", "plan.lower"}, {"plan.search", "plan.simulate"}, {"plan.show", "plan.timeline"}),
    *({"plan.asdict"}, {"plan"}, {"study"}, {"train"}),
]
# By the first part of their names. The config asks where files are, and leaves reading them to OmegaConf.
EFFECTS = {"data", "checkpoint", "metrics", "hardware", "launch", "train", "study"}
ALLOWED = {name: {"pathlib", "pathlib.Path"} for name in ("config", "errors", "settings", "plan.timeline")}
ALLOWED["plan.lower"] = {"os", "time"}

IMPURE_MODULES = {
    *("datetime", "fsspec", "glob", "io", "logging", "os", "pathlib", "random", "requests", "secrets", "shutil", "signal"),
    *("socket", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid"),
}
IMPURE_CALLS = {"open", "print", "input"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}  # by plain name: a method of that name is another thing
UNSAFE_METHODS = {"unsafe_load", "full_load", "UnsafeLoader", "FullLoader", "load_all"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
SCRIPTS = {f"scripts/{path.name}": path for path in sorted((ROOT / "scripts").glob("*.py"))}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in {**MODULES, **SCRIPTS}.items()}


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, at its top or inside a function; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "an import relative to the package"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(source: str) -> set[str]:
    """The modules of the package that a source imports."""
    names = {name.removeprefix(PACKAGE).removeprefix(".") for name in imported(source) if name.split(".")[0] == PACKAGE}
    # A name in a module is not a module, and a package on the way to one is not what is meant.
    found = names & set(MODULES)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found) and name}


def floor(name: str) -> int:
    for i, modules in enumerate(FLOORS):
        if name in modules or (name.startswith("study.") and "study" in modules):
            return i
    raise LookupError(f"{name} has no floor: add it to FLOORS")


def upward(name: str, source: str) -> list[str]:
    """The imports of a module that do not point down; within study/ they may point to each other."""
    within = name.startswith("study")
    return sorted(o for o in ours(source) if floor(o) >= floor(name) and not (within and o.startswith("study")))


def test_every_module_has_a_floor():
    assert len(MODULES) > 15
    for name in MODULES:
        floor(name)
    flat = [name for modules in FLOORS for name in modules]
    assert len(flat) == len(set(flat))


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    assert not upward(name, SOURCES[name])


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ops", "from mutransformer.model import Block"),
        ("ops", "from mutransformer import model"),
        ("spec", "import mutransformer.mup"),
        ("mesh", "def f():\n    from mutransformer.state import plan"),
        ("data.tokenize", "from mutransformer.data import corpus"),
        ("data.sources", "from mutransformer.data import build"),
        ("state", "from mutransformer.data import pipeline\nfrom mutransformer import metrics"),
    ],
)
def test_an_upward_import_is_caught(name, source):
    assert upward(name, source)
    assert not upward(name, "from mutransformer.config import Config\nimport jax")


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def effects(source: str) -> set[str]:
    """What a source would touch the world with."""
    found = {name for name in imported(source) if name.split(".")[0] in IMPURE_MODULES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in IMPURE_CALLS or name.rsplit(".", 1)[-1] in {"read_text", "write_text", "read_bytes", "write_bytes"}:
                found.add(name)
            if name.startswith(("jnp.load", "jnp.save", "np.load", "np.save", "np.random", "jax.debug")):
                found.add(name)
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] not in EFFECTS])
def test_the_rest_is_pure(name):
    assert effects(SOURCES[name]) <= ALLOWED.get(name, set())


def test_effects_are_seen():
    assert effects("import time") and effects("from pathlib import Path") and effects("def f(p):\n    return open(p).read()")
    assert effects("import numpy as np\nnp.load('a')") and effects("def f(p):\n    p.write_text('a')")
    assert not effects("import jax\njax.jit(f).lower(x)\nfrom math import prod")
    assert effects(SOURCES["metrics"]) and effects(SOURCES["data.cache"])


def test_a_mistake_in_a_yaml_is_told_before_jax_starts():
    assert not {"jax", "equinox", "optax"} & {i.split(".")[0] for i in imported(SOURCES["config"])}
    for name in ("settings", "launch", *SCRIPTS):
        tree = ast.parse(SOURCES[name])
        at_top = ast.unparse(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))
        assert not {"jax", "equinox", "optax"} & {i.split(".")[0] for i in imported(at_top)}
        assert ours(at_top) <= {"config", "settings", "launch"}


def unsafe(source: str) -> set[str]:
    """What in a source would run code that it was given as data."""
    found = {name for name in imported(source) if name.split(".")[0] in UNSAFE_MODULES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rsplit(".", 1)[-1]
            if name in UNSAFE_CALLS or last in UNSAFE_METHODS or name == "yaml.load":
                found.add(name)
            if last in {"system", "popen"} or (last == "from_pretrained" and not _told(node, "trust_remote_code", False)):
                found.add(name)
        if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code", "shell"}:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.add(node.arg)
        if isinstance(node, ast.Attribute) and node.attr in UNSAFE_METHODS:
            found.add(node.attr)
    return found


def _told(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_runs_what_it_has_read(name):
    assert not unsafe(SOURCES[name])


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import load", "eval('1')", "exec(text)", "np.load(p, allow_pickle=True)"),
        *("yaml.load(text, Loader=yaml.UnsafeLoader)", "yaml.unsafe_load(text)", "subprocess.run(c, shell=True)"),
        *("AutoTokenizer.from_pretrained(n)", "AutoTokenizer.from_pretrained(n, trust_remote_code=True)", "os.system(c)"),
    ],
)
def test_unsafe_calls_are_seen(source):
    assert unsafe(source)
    assert not unsafe("yaml.safe_load(t)\nlowered.compile()\nre.compile(p)\nA.from_pretrained(n, trust_remote_code=False)")


def test_collectives_are_spelled_in_one_file():
    spelled = re.compile(r"\b(all_gather|psum|psum_scatter|pmax|pmean|ppermute|all_to_all|pcast|axis_index)\(")
    assert {name for name, source in SOURCES.items() if spelled.search(source)} == {"collectives"}
