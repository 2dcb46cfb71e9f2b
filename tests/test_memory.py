"""What a compiled step holds: shares of the state that fall with the number of devices, and nothing that is whole for long."""

import re
from functools import cache
from math import prod

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from programs import program, specs

from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import Batch
from mutransformer.sharding.mesh import batch_pspec, make_mesh
from mutransformer.training.step import make_train_step

# 2560 tokens a device where x is 8: five times as many as have logits at a time, and not the size of anything else.
LARGE = ["configs/large.yaml", "model.n_vocab=3584", "data.batch_size=80"]


def compiled(config: Config) -> jax.stages.Compiled:
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.x * config.mesh.y])
    at = NamedSharding(mesh, batch_pspec(mesh))
    shape = config.data.batch_size, config.data.seq_len
    batch = Batch(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=at), jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=at))
    built = program(config, mesh)
    return make_train_step(built).lower(built.state, batch).compile()


@cache
def step(*overrides: str) -> tuple[Config, set[tuple[int, ...]]]:
    """A config, and the shapes of all that its compiled step ever holds; dims of size 1 left out."""
    config = load([*LARGE, *overrides])
    found = re.findall(r"\b[a-z]+[0-9]+\[([\d,]+)\]", compiled(config).as_text() or "")
    return config, {tuple(n for n in map(int, dims.split(",")) if n > 1) for dims in found}


def has_logits(config: Config, shapes: set[tuple[int, ...]]) -> bool:
    """Of all of a device's tokens."""
    b, T = config.data.batch_size // config.mesh.x, config.data.seq_len
    entries = {config.model.padded_vocab, config.model.padded_vocab // config.mesh.y}
    return any({(b, T, v), (b * T, v), (v, b * T)} & shapes for v in entries)


def whole_stacks(config: Config, shapes: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Matrices of all layers that are whole along x, with their dims apart or merged: gathered weights, or gradients in full."""
    whole: set[tuple[int, ...]] = set()
    for w in jax.tree.leaves(specs(config).blocks):
        if w.is_matrix:
            layers, *dims = (d.size // config.mesh.y if d.axis == "y" else d.size for d in w.dims)
            split = len(dims) - w.n_out
            whole |= {(layers, *dims), (layers, prod(dims[:split]), prod(dims[split:]))}
    return whole & shapes


@pytest.mark.parametrize(("x", "y"), [pytest.param(8, 1, marks=pytest.mark.slow), (4, 2)])
def test_no_logits_and_no_weights_or_gradients_of_all_layers_are_ever_whole(x: int, y: int) -> None:
    config, shapes = step(f"mesh.x={x}", f"mesh.y={y}")
    assert not has_logits(config, shapes)
    assert not whole_stacks(config, shapes)


def test_the_same_is_seen_where_it_is_so() -> None:
    """The control of the logits: all tokens at a time."""
    assert has_logits(*step("mesh.x=8", "model.head_chunk=2560"))


@pytest.mark.slow
def test_gradients_kept_in_full_until_the_end_of_the_step_are_seen() -> None:
    """The control of the gradients."""
    assert whole_stacks(*step("mesh.x=8", "optim.grad_accumulation_steps=2", "optim.grad_sync=step", "data.batch_size=160"))


@pytest.mark.slow
def test_a_devices_share_of_the_state_falls_with_the_number_of_devices() -> None:
    def held(x: int, y: int) -> int:
        config = load([*LARGE, f"mesh.x={x}", f"mesh.y={y}"])
        mesh = make_mesh(config.mesh, jax.devices()[: x * y])
        shapes = program(config, mesh).state
        return sum(jnp.dtype(a.dtype).itemsize * prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(shapes))

    whole = held(1, 1)
    parameters = sum(w.size for w in jax.tree.leaves(specs(load(LARGE))))
    assert whole == pytest.approx(12 * parameters, rel=1e-6)
    for x, y in [(2, 1), (1, 2), (4, 2), (2, 4), (8, 1)]:
        assert held(x, y) == pytest.approx(whole / (x * y), rel=1e-6)
    config = load([*LARGE, "mesh.x=4", "mesh.y=2"])
    memory = compiled(config).memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == pytest.approx(whole / 8, rel=1e-3)
