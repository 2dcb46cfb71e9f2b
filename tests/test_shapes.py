"""Shapes are checked while tests run, inside shard_map too: a wrong annotation or a wrong rank is an error."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import TypeCheckError, install_import_hook

from mutransformer.config.run import MeshConfig
from mutransformer.model import ops
from mutransformer.model.attention import attention
from mutransformer.model.matmul import dot_rows
from mutransformer.sharding.mesh import make_mesh

MODULE = """
from jax import Array
from jaxtyping import Float


def right(x: Float[Array, "b m"]) -> Float[Array, "b m"]:
    return x * 2


def wrong(x: Float[Array, "b m"]) -> Float[Array, "m b"]:
    return x * 2

"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "made_up_shapes.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_up_shapes", raising=False)
    importlib.invalidate_caches()
    with install_import_hook("made_up_shapes", "beartype.beartype"):
        return importlib.import_module("made_up_shapes")


def test_a_wrong_annotation_is_caught_inside_shard_map(module):
    mesh = make_mesh(MeshConfig(2, 4))

    def mapped(f):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y")))

    x = jnp.ones((4, 12))
    assert np.array_equal(mapped(module.right)(x), 2 * x)
    with pytest.raises(TypeCheckError):
        mapped(module.wrong)(x)


def test_shards_are_checked_and_not_what_they_are_of(module):
    """4 x 8 on a 2 x 4 mesh: square shards satisfy an annotation that the whole does not."""
    mesh = make_mesh(MeshConfig(2, 4))
    mapped = jax.shard_map(module.wrong, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y"))
    assert mapped(jnp.ones((4, 8))).shape == (4, 8)
    with pytest.raises(TypeCheckError):
        module.wrong(jnp.ones((4, 8)))


X = jnp.ones((2, 3, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.rotary(X, 10.0),
        lambda: attention(X, X, X, 1.0, "softmax", 1e-5),
        lambda: attention(X[..., None], X[..., None], X[:, :2, :, None], 1.0, "softmax", 1e-5),
        lambda: ops.shift_right(X[..., 0], 0),
        lambda: ops.shift_right(jnp.ones(3, jnp.int32), 0),
        lambda: ops.rms_norm(jnp.ones((2, 4), jnp.int32), 1e-5),
        lambda: ops.rms_norm(X, "1e-5"),  # pyright: ignore[reportArgumentType]
        lambda: dot_rows(X[0], X[0].T, tiled=False),
        lambda: attention(X[..., None], X[..., None], X[..., None], "small", "softmax", 1e-5),  # pyright: ignore
    ],
)
def test_a_wrong_rank_size_dtype_or_type_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()


def test_the_right_ones_are_taken():
    x = X[..., None] * jnp.ones((1, 1, 1, 2))
    assert attention(ops.rotary(x, 10.0), x, x, 1.0, "softmax", 1e-5).shape == x.shape
    assert ops.shift_right(jnp.ones((2, 3), jnp.int32), 0).shape == (2, 3)
    assert dot_rows(X[0], X[0][:, :2], tiled=False).shape == (4, 2)


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(X, jnp.ones(4))
