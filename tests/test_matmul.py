"""A projection and the loss of the unembedding are those of plain formulas, values and gradients, on any mesh, at odd sizes."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from programs import program, specs
from test_sharding import loss_and_grads, unsharded, worst

from mutransformer.config.load import load
from mutransformer.config.run import MeshConfig
from mutransformer.data.batches.pipeline import Batch
from mutransformer.model.loss import Head, head_loss
from mutransformer.model.matmul import MatmulPolicy, dot, dot_rows, gather_matrix, look_up, project
from mutransformer.mup.rules import init_std
from mutransformer.sharding.collectives import gather_x, scatter_y, sum_rows, sum_y
from mutransformer.sharding.mesh import make_mesh, put_batch
from mutransformer.sharding.spec import weight
from mutransformer.training.program import Program, TrainState, scaling_of
from mutransformer.training.step import make_train_step

GRIDS = [(1, 1), (2, 2), (1, 4)]
SIZES = {"M": 12, "H": 4, "D": 5, "V": 44}
FULL, LOW = MatmulPolicy("float32", "float32", True), MatmulPolicy("bfloat16", "float32", True)


def mesh_of(grid: tuple[int, int]) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*grid), jax.devices()[: grid[0] * grid[1]])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def distance(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def distances(ours: Any, theirs: Any) -> dict[str, float]:
    paths = jax.tree_util.tree_leaves_with_path(theirs)
    return {jax.tree_util.keystr(p): distance(a, b) for (p, b), a in zip(paths, jax.tree.leaves(ours), strict=True)}


@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_project(grid, again, exchange):
    """To heads, through a nonlinearity, and back: a weight split by out dims, then one split by in dims."""
    into, out = weight("M/x -> H/y D", SIZES), weight("H/y D -> M/x", SIZES)
    x, w, v, by = normal(0, 4, 3, 12), normal(1, 12, 4, 5), normal(2, 4, 5, 12), normal(3, 4, 3, 12)

    def sharded(x: jax.Array, w: jax.Array, v: jax.Array, by: jax.Array) -> jax.Array:
        x = jax.lax.pcast(x, "y", to="varying")
        hidden = jnp.sin(project(x, gather_matrix(w, into, FULL, again), into, FULL))
        return sum_rows(sum_y(jnp.sum(scatter_y(project(hidden, gather_matrix(v, out, FULL, again), out, FULL), exchange) * by)))

    def plain(x: jax.Array, w: jax.Array, v: jax.Array, by: jax.Array) -> jax.Array:
        hidden = jnp.sin(jnp.einsum("btm,mhd->bthd", x, w, precision="highest"))
        return jnp.sum(jnp.einsum("bthd,hdm->btm", hidden, v, precision="highest") * by)

    in_specs = P("x"), into.pspec, out.pspec, P("x", None, "y")
    mapped = jax.shard_map(sharded, mesh=mesh_of(grid), in_specs=in_specs, out_specs=P())
    ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, w, v, by) for f in (mapped, plain))
    assert max(distances(ours, theirs).values()) < 1e-5
    wrong = jax.jit(jax.grad(plain, (0, 1, 2)))(x, 1.001 * w, v, by)
    assert max(distances(ours[1], wrong).values()) > 1e-5


def test_project_rounds_once():
    spec = weight("M/x -> F/y", {"M": 256, "F": 24})
    x, w = normal(0, 2, 3, 256).astype(jnp.bfloat16), normal(1, 256, 24)
    in_specs, out_specs = (P("x"), spec.pspec), P("x", None, "y")
    mapped = jax.shard_map(
        lambda x, w: project(x, gather_matrix(w, spec, LOW, True), spec, LOW),
        mesh=mesh_of((1, 1)),
        in_specs=in_specs,
        out_specs=out_specs,
    )
    ours = jax.jit(mapped)(x, w)
    exact = np.asarray(x, np.float64).reshape(6, 256) @ np.asarray(w.astype(jnp.bfloat16), np.float64)
    assert ours.dtype == jnp.bfloat16
    assert np.all(np.abs(np.asarray(ours, np.float64).reshape(6, 24) - exact) <= 2**-8 * np.abs(exact) + 1e-4)


TOKENS, N_VOCAB, CHUNK = (4, 5), 37, 3  # 20 rows; 44 entries of which 7 are padding


def loss_inputs() -> tuple[Any, ...]:
    rng = np.random.default_rng(5)
    targets, mask = rng.integers(0, N_VOCAB, TOKENS, dtype=np.int32), rng.random(TOKENS) < 0.7
    mask[0, 0], mask[0, 1] = True, False
    return normal(6, *TOKENS, 12), normal(7, 12, 44), normal(8, 44), jnp.asarray(targets), jnp.asarray(mask)


def sharded_loss(grid: tuple[int, int], policy: MatmulPolicy, chunk: int, n_vocab: int, biased: bool, z_loss: float = 0.0) -> Any:
    spec, bias_spec = weight("M/x -> V/y", SIZES), weight("-> V/y", SIZES, role="bias")
    head = Head(spec, policy, n_vocab, chunk, z_loss)

    def loss(h: jax.Array, w: jax.Array, bias: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        h = jax.lax.pcast(h, "y", to="varying")
        own = gather_x(bias, bias_spec, policy.compute, policy.grad_reduce_dtype) if biased else None
        sums: Any = head_loss(h, w, own, targets, mask, head)
        return sum_rows(sums[0])

    in_specs = P("x"), spec.pspec, bias_spec.pspec, P("x"), P("x")
    return jax.shard_map(loss, mesh=mesh_of(grid), in_specs=in_specs, out_specs=P())


def plain_loss(h: Any, w: Any, bias: Any, targets: Any, mask: Any, z_loss: float = 0.0) -> Any:
    logits = jnp.einsum("btm,mv->btv", h, w[:, :N_VOCAB], precision="highest") + bias[None, None, :N_VOCAB]
    each = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum((each + z_loss * jnp.square(jax.nn.logsumexp(logits, -1))) * mask)


@pytest.mark.parametrize(("grid", "chunk"), [((1, 1), CHUNK), ((2, 2), CHUNK), ((1, 4), 7), ((1, 1), 1000)])
def test_head_loss(grid, chunk):
    """Values and gradients; and what they tell of padding and of masked targets."""
    args = loss_inputs()
    loss = sharded_loss(grid, FULL, chunk, N_VOCAB, biased=True)
    # Scaled, so that the gradient by the loss is not one.
    ours, theirs = (jax.jit(jax.value_and_grad(lambda *a, f=f: 0.3 * f(*a), (0, 1, 2)))(*args) for f in (loss, plain_loss))
    assert max(distances(ours, theirs).values()) < 1e-5
    assert distance(jax.jit(loss)(*args) * 0.3, ours[0]) < 1e-6  # the value alone takes another path
    of_h, of_w, of_bias = map(np.asarray, ours[1])
    mask = np.asarray(args[4])
    assert not np.any(of_h[~mask]) and np.all(np.any(of_h[mask], axis=-1))
    assert not np.any(of_w[:, N_VOCAB:]) and not np.any(of_bias[N_VOCAB:])
    assert np.all(np.any(of_w[:, :N_VOCAB], axis=0))
    assert abs(of_bias.sum()) < 1e-5


@pytest.mark.parametrize("grid", [(1, 1), (2, 2)])
def test_z_loss(grid):
    args = loss_inputs()
    ours = jax.jit(jax.value_and_grad(sharded_loss(grid, FULL, CHUNK, N_VOCAB, True, z_loss=0.1), (0, 1, 2)))(*args)
    theirs, without = (jax.jit(jax.value_and_grad(partial(plain_loss, z_loss=z), (0, 1, 2)))(*args) for z in (0.1, 0.0))
    assert max(distances(ours, theirs).values()) < 1e-5
    assert min(distances(ours, without).values()) > 0.01


def test_padding_matters():
    args = loss_inputs()
    wrong = jax.jit(sharded_loss((1, 1), FULL, CHUNK, SIZES["V"], biased=True))(*args)
    assert distance(wrong, plain_loss(*args)) > 0.01


@pytest.mark.parametrize("grid", [(1, 1), (2, 2)])
def test_head_loss_without_bias_in_bfloat16(grid):
    h, w, bias, targets, mask = loss_inputs()
    loss = sharded_loss(grid, LOW, CHUNK, N_VOCAB, biased=False)
    ours = jax.jit(jax.value_and_grad(loss, (0, 1)))(h.astype(jnp.bfloat16), w, bias, targets, mask)
    rounded = h.astype(jnp.bfloat16).astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32), jnp.zeros_like(bias)
    theirs = jax.jit(jax.value_and_grad(plain_loss, (0, 1)))(*rounded, targets, mask)
    assert ours[1][0].dtype == jnp.bfloat16 and ours[1][1].dtype == jnp.float32
    assert distance(ours[0], theirs[0]) < 1e-5  # factors are exact, sums are float32
    assert max(distances(ours[1], theirs[1]).values()) < 2**-7  # the gradient by the logits is rounded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "tiled"),
    [((32, 32, 64), 1), ((64, 96, 32), 1), ((64, 32, 32), 1), ((33, 32, 32), 0), ((32, 31, 64), 0), ((1, 2, 3), 0)],
)
def test_dot_rows_is_one_sum_however_it_is_taken(shape, tiled, dtype):
    rows, m, n = shape
    a, b = normal(0, rows, m).astype(dtype), normal(1, rows, n).astype(dtype)
    exact = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
    plain, fast = jax.jit(lambda a, b: dot(a, b, (0, 0)))(a, b), jax.jit(partial(dot_rows, tiled=True))(a, b)
    assert plain.dtype == fast.dtype == jnp.float32
    assert distance(plain, exact) < 1e-6 and distance(fast, exact) < 1e-6
    assert ("transpose" in str(jax.make_jaxpr(partial(dot_rows, tiled=True))(a, b))) == bool(tiled)


def test_products_of_small_sizes_run_in_bfloat16():
    """XLA on a CPU has been seen to compile products of bfloat16 factors that it then cannot run, by their sizes and layouts."""
    sizes = list(itertools.product((1, 3, 8, 32), (1, 2, 7, 24), (1, 3, 8, 32)))
    low = [(normal(0, rows, m).astype("bfloat16"), normal(1, rows, n).astype("bfloat16")) for rows, m, n in sizes]
    ours = jax.jit(lambda pairs: [dot_rows(a, b, tiled=True) for a, b in pairs])(low)
    for (a, b), c in zip(low, ours, strict=True):
        assert distance(c, np.asarray(a, np.float64).T @ np.asarray(b, np.float64)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "head", "row", "rows", "grid", "settings"),
    [
        (48, 24, 7, 3, (1, 1), ("model.n_kv_head=1", "model.activation=swiglu", "model.attention_activation=norm_elu")),
        (
            64,
            16,
            130,
            4,
            (2, 2),
            ("model.n_kv_head=2", "optim.grad_accumulation_steps=2", "model.remat=full", "model.biases=true"),
        ),
    ],
)
def test_a_train_step_runs_in_bfloat16(width, head, row, rows, grid, settings):
    config = load(
        [
            f"model.d_model={width}",
            f"model.d_head={head}",
            f"data.seq_len={row}",
            f"data.batch_size={rows}",
            "model.n_layer=1",
            "model.n_vocab=50",
            "model.vocab_multiple=8",
            f"mesh.x={grid[0]}",
            f"mesh.y={grid[1]}",
            "precision.compute=bfloat16",
            "optim.lr=0.01",
            "optim.warmup_steps=0",
            *settings,
        ]
    )
    mesh = mesh_of(grid)
    program(config, mesh)
    rng = np.random.default_rng(0)
    # Zeros, then weights at their scale: drawing them with JAX would take longer to compile than the step.
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), program(config, mesh).state)
    params = jax.tree.map(
        lambda w: (init_std(w, scaling_of(config)) * rng.normal(size=w.shape)).astype(np.float32),
        specs(config),
    )
    state = jax.device_put(TrainState(state.step, params, state.opt), program(config, mesh).state_shardings)
    tokens = rng.integers(0, 50, (rows, row), dtype=np.int32)
    batch = put_batch(Batch(tokens, np.ones_like(tokens, dtype=bool)), mesh)
    _, metrics = make_train_step(program(config, mesh, 0))(state, batch)
    assert all(np.isfinite(m) for m in metrics.values()) and metrics["gradient_norm"] > 0.01
    assert abs(float(metrics["loss"]) - np.log(50)) < 0.5


@pytest.mark.slow
def test_projections_with_separate_dims() -> None:
    """As on an accelerator: the same loss and gradients as with merged dims, which XLA:CPU needs."""

    def separate(program: Program) -> Program:
        return replace(program, forward=replace(program.forward, policy=program.forward.policy._replace(merge_dims=False)))

    want, want_grads = unsharded("all options")
    metrics, grads = loss_and_grads("all options", 2, 2, change=separate)
    assert metrics["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert worst(grads, want_grads) <= 1e-5


@pytest.mark.parametrize("grid", [(1, 1), (4, 2)])
def test_a_frequent_tokens_gradient_does_not_stall(grid: tuple[int, int]) -> None:
    """4096 places of one token. The control sums in bfloat16, as the gradient of an index does."""
    config = load(["model.d_model=64", "model.d_head=32", "model.n_vocab=128", f"mesh.x={grid[0]}", f"mesh.y={grid[1]}"])
    mesh, spec = mesh_of(grid), specs(config).embed
    ids = np.where(np.arange(4096) % 10 == 0, np.arange(4096) % 128, 7).reshape(16, 256).astype(np.int32)
    up = np.random.default_rng(0).normal(1.0, 0.5, (16, 256, 64)).astype(jnp.bfloat16)
    exact = np.zeros((128, 64))
    np.add.at(exact, ids, up.astype(np.float64))

    def grad(look: Callable[..., Any], typed: Any) -> np.ndarray:
        def total(table: Any, ids: Any, up: Any) -> Any:
            whole = gather_x(table, spec, jnp.bfloat16, jnp.float32, typed=typed)
            return lax.psum(jnp.sum((look(whole, ids) * up).astype(jnp.float32)), ("x", "y"))

        cut = (spec.pspec, P("x"), P("x", None, "y"))
        mapped = jax.shard_map(jax.grad(total), mesh=mesh, in_specs=cut, out_specs=spec.pspec)
        return np.asarray(jax.jit(mapped)(np.zeros((128, 64), np.float32), ids, up))

    def error(found: np.ndarray) -> float:
        return float(np.linalg.norm(found[7] - exact[7]) / np.linalg.norm(exact[7]))

    assert error(grad(lambda table, ids: look_up(table, ids, jnp.bfloat16), jnp.float32)) < 1e-5
    assert error(grad(lambda table, ids: jnp.take(table, ids, axis=0), None)) > 0.01
