"""Imports point only downwards, only the named modules touch disk, network or clock, and nothing runs what it has read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mutransformer"

# From the ground up. A package imports only packages below its own; within a package there are no cycles.
FLOORS = ["errors", "mup", "config", "sharding", "model", "data", "training", "generation", "exchange"]
FLOORS += ["planning", "study", "commands", "cli"]
TOP = "__main__"  # calls the command line; above all floors, no part of the house
# Those that touch disk, network or clock.
EFFECTS = {"data", "exchange", "study", "commands", "cli", TOP}
EFFECTS |= {f"sharding.{name}" for name in ("compile_cache", "devices", "processes", "peers", "stopping")}
EFFECTS |= {
    f"training.{name}"
    for name in ("checkpoint", "metrics", "sinks", "skipped_steps", "run_folder", "preflight", "profile", "loop")
}
EFFECTS |= {f"training.{name}" for name in ("checkpoint_storage", "url_checkpoints", "url_folder", "layer_log")}
ALLOWED = {name: {"pathlib", "pathlib.Path"} for name in ("", "config.schema", "errors", "planning.timeline")}
ALLOWED["config.load"] = {"pathlib", "pathlib.Path", "path.read_text", "fsspec", "fsspec.open"}  # YAML files
ALLOWED["planning.compiled.compilers"] = {"os", "time"}
ALLOWED["mup.checks.slopes"] = {"io"}  # a text in memory
ALLOWED["training.heat_maps"] = {"io", "io.BytesIO"}  # an image in memory
ALLOWED["mup.checks.rate_sweep"] = {"logging", "time"}

IMPURE_MODULES = {
    "datetime",
    "fsspec",
    "glob",
    "io",
    "logging",
    "os",
    "pathlib",
    "random",
    "requests",
    "secrets",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "urllib",
    "uuid",
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
    """The index of the package that a module is in."""
    top = name.split(".")[0]
    if top not in [*FLOORS, TOP]:
        raise LookupError(f"{top} has no floor: add it to FLOORS")
    return [*FLOORS, TOP].index(top)


def upward(name: str, source: str) -> list[str]:
    """The imports of a module that do not point down to another package."""
    same = name.split(".")[0]
    return sorted(o for o in ours(source) if o.split(".")[0] != same and floor(o) > floor(name))


def test_every_package_has_a_floor():
    assert {name.split(".")[0] for name in MODULES if name} <= {*FLOORS, TOP}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_down(name):
    assert not upward(name, SOURCES[name])


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model.ops", "from mutransformer.training.step import update"),
        ("mup.rules", "import mutransformer.model.ops"),
        ("sharding.mesh", "def f():\n    from mutransformer.training.program import plan"),
        ("data.cache.dataset", "from mutransformer.training import loop"),
        ("training.program", "from mutransformer.study.sweep import grid"),
    ],
)
def test_an_upward_import_is_caught(name, source):
    assert upward(name, source)
    assert not upward(name, "from mutransformer.errors import check\nimport jax")


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty if there are none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_modules_import_each_other():
    assert not cycle({name: ours(source) for name, source in SOURCES.items() if name})
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


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


@pytest.mark.parametrize("name", [name for name in MODULES if name not in EFFECTS and name.split(".")[0] not in EFFECTS])
def test_the_rest_is_pure(name):
    assert effects(SOURCES[name]) <= ALLOWED.get(name, set())


def test_effects_are_seen():
    assert effects("import time") and effects("from pathlib import Path") and effects("def f(p):\n    return open(p).read()")
    assert effects("import numpy as np\nnp.load('a')") and effects("def f(p):\n    p.write_text('a')")
    assert not effects("import jax\njax.jit(f).lower(x)\nfrom math import prod")
    assert effects(SOURCES["training.metrics"]) and effects(SOURCES["data.cache.store"])


LIGHT = {"errors", "config", "commands", "cli", TOP}  # packages that import no JAX, or only when a command runs


def heavy(source: str) -> set[str]:
    """What a source imports at its top that takes seconds, so that a mistake in the settings would be reported late."""
    tree = ast.parse(source)
    at_top = ast.unparse(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))
    libraries = {"jax", "equinox", "optax", "numpy", "grain", "orbax"} & {i.split(".")[0] for i in imported(at_top)}
    own = ours(at_top) - {
        "sharding.processes",
        "sharding.stopping",
        "mup.rules",
        "mup.checks.slopes",
    }  # these import NumPy at most
    return libraries | {name for name in own if name.split(".")[0] not in LIGHT}


LIGHT_MODULES = [name for name in MODULES if name.split(".")[0] in LIGHT]


@pytest.mark.parametrize("name", [*LIGHT_MODULES, "sharding.processes", *SCRIPTS])
def test_settings_are_checked_before_jax_starts(name):
    assert not heavy(SOURCES[name])


def test_heavy_imports_are_seen():
    assert heavy("from mutransformer.training.loop import train") and heavy("import jax.numpy as jnp")
    assert not heavy("from mutransformer.config.load import load\ndef f():\n    import jax")


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
        "import pickle",
        "from pickle import load",
        "eval('1')",
        "exec(text)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(c, shell=True)",
        "AutoTokenizer.from_pretrained(n)",
        "AutoTokenizer.from_pretrained(n, trust_remote_code=True)",
        "os.system(c)",
    ],
)
def test_unsafe_calls_are_seen(source):
    assert unsafe(source)
    assert not unsafe("yaml.safe_load(t)\nlowered.compile()\nre.compile(p)\nA.from_pretrained(n, trust_remote_code=False)")


def test_collectives_are_spelled_in_one_file():
    spelled = re.compile(r"\b(all_gather|psum|psum_scatter|pmax|pmean|ppermute|all_to_all|pcast|axis_index)\(")
    assert {name for name, source in SOURCES.items() if spelled.search(source)} == {"sharding.collectives"}


def test_a_config_is_resolved_in_one_module():
    """Specs, mesh, optimizer, shardings and execution settings are derived from a config by build() only."""
    derived = re.compile(r"(?<!def )\b(transformer_specs|make_mesh|Optimizer|abstract_state|scaling_of|execution\.resolve)\(")
    assert {name for name, source in SOURCES.items() if derived.search(source)} == {"training.program"}
    assert derived.search("mesh = make_mesh(config.mesh)") and not derived.search("def make_mesh(config):")
