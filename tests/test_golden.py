"""What every YAML in configs/ means, weight by weight, is reviewed like code; and every one of them traces a step on a mesh.

`python tests/test_golden.py` writes the tables anew.
"""

import difflib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import slow_unless
from programs import program, specs

from mutransformer import mup
from mutransformer.config.load import load
from mutransformer.config.schema import Config, flatten
from mutransformer.data.batches.pipeline import Batch
from mutransformer.sharding.mesh import make_mesh
from mutransformer.training.program import scaling_of
from mutransformer.training.step import make_eval_step, make_train_step

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
YAMLS = sorted(str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.yaml"))
WIDTHS = ("small", "medium", "large", "huge")


def config_of(name: str, *args: str) -> Config:
    config = load([str(ROOT / "configs" / f"{name}.yaml"), *args])
    return config.with_vocab(config.model.n_vocab or config.data.vocab_size)


def golden(name: str) -> Path:
    return GOLDEN / f"{name.replace('/', '_')}.txt"


def table(config: Config) -> str:
    """A line a weight."""
    weights = jax.tree_util.tree_leaves_with_path(specs(config))
    rows = [("weight", "shape", "sharding", "role", "init std", "learning rate", "decay")]
    for path, w in weights:
        rows.append(
            (
                jax.tree_util.keystr(path, simple=True, separator="."),
                str(w.shape),
                "(" + ", ".join(axis or "-" for axis in w.axes) + ")",
                w.role,
                f"{mup.init_std(w, scaling_of(config)):.4g}",
                f"{config.optim.lr * mup.lr_multiplier(w, scaling_of(config)):.4g}",
                "yes" if mup.decay_multiplier(w, scaling_of(config)) else "no",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"total: {sum(w.size for _, w in weights):,} parameters"]) + "\n"


def write() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*.txt"):
        stale.unlink()
    for name in YAMLS:
        golden(name).write_text(table(config_of(name)), encoding="utf-8")


def difference(name: str, config: Config) -> str:
    """Empty if the table is the golden one."""
    path = golden(name)
    have = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(have.splitlines(), table(config).splitlines(), str(path.name), "now", lineterm="")
    return "\n".join(lines)


@pytest.mark.parametrize("name", YAMLS)
def test_table(name):
    changed = difference(name, config_of(name))
    assert not changed, f"{changed}\nIf this is meant: python tests/test_golden.py, and review the change"


def test_every_table_is_of_a_yaml():
    assert len({golden(name) for name in YAMLS}) == len(YAMLS) >= 4
    assert {path.name for path in GOLDEN.glob("*.txt")} == {golden(name).name for name in YAMLS}


@pytest.mark.parametrize("change", ["model.d_model=192", "optim.lr=0.03", "model.residual_init=zero", "optim.decay_vectors=true"])
def test_a_change_shows(change):
    before, after = (table(config_of("small", "model.norm_scale=vector", *args)) for args in ((), (change,)))
    lines = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert lines
    assert "+embed " in difference("small", config_of("small", "model.d_model=192"))


# By default one of each kind, on a mesh.
FEW = [(name, 8) for name in ("small", "huge", "study", "paper/width128", "presets/completed_p", "presets/delphi", "scale/10b")]


@pytest.mark.parametrize(("name", "n_devices"), slow_unless(FEW, [(name, n) for name in YAMLS for n in (1, 8)]))
def test_every_yaml_traces_a_step(name, n_devices):
    y = 2 if n_devices == 8 and config_of(name).model.n_head % 2 == 0 else 1
    x = n_devices // y
    config = config_of(name, f"mesh.x={x}", f"mesh.y={y}")
    mesh = make_mesh(config.mesh, jax.devices()[: x * y])
    program(config, mesh)
    shape = config.data.batch_size, config.data.seq_len
    batch = Batch(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_))
    before = program(config, mesh).state
    after, metrics = jax.eval_shape(make_train_step(program(config, mesh, 0)), before, batch)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), before)
    assert all(m.shape == () and m.dtype == jnp.float32 for m in metrics.values())
    total, count = jax.eval_shape(make_eval_step(program(config, mesh, 0)), before.params, batch)
    assert (total.shape, total.dtype, count.shape, count.dtype) == ((), jnp.float32, (), jnp.int32)


def test_the_widths_differ_in_width_only():
    settings = {name: flatten(config_of(name)) for name in WIDTHS}
    differ = {key for key, value in settings["small"].items() if any(s[key] != value for s in settings.values())}
    assert differ == {"name", "model.d_model", "model.remat"}
    sizes = [settings[name]["model.d_model"] for name in WIDTHS]
    assert all(wide == 4 * narrow for narrow, wide in zip(sizes, sizes[1:], strict=False))


if __name__ == "__main__":
    write()
