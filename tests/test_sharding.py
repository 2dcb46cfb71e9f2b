"""How the model is spread over devices changes nothing: loss and every gradient, on every mesh; and nothing rests twice."""

from collections.abc import Callable
from functools import cache

import jax
import numpy as np
import pytest
from cases import slow_unless
from jax.sharding import PartitionSpec
from programs import program, specs

from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import Batch
from mutransformer.model.transformer import Transformer
from mutransformer.sharding import collectives
from mutransformer.sharding.mesh import make_mesh, put_batch
from mutransformer.sharding.spec import Weight
from mutransformer.training.program import Program
from mutransformer.training.step import make_loss_and_grads, make_train_step

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (8, 1), (1, 8)]
TINY = [
    "model.d_model=64",
    "model.d_base=32",
    "model.d_head=8",
    "model.n_layer=2",
    "model.n_vocab=250",  # not the padded 256: some of the vocabulary must get no probability on the last device only
    "model.head_chunk=24",
    "data.seq_len=16",
    "data.batch_size=8",
    "precision.compute=float32",
]
MODELS = {
    "relu": [],
    "all options": [
        "model.activation=swiglu",
        "model.n_kv_head=1",
        "model.norm_scale=vector",
        "model.biases=true",
        "model.qk_norm=true",
        "model.embed_norm=true",
    ],
    "wide heads, multipliers": [
        "model.attention_multiple=2",
        "model.embed_multiplier=2",
        "model.residual_multiplier=0.5",
        "model.logits_multiplier=2",
        "model.n_kv_head=2",
        "model.activation=swiglu",
        "model.norm_scale=vector",
        "model.qk_norm=true",
        "model.biases=true",
    ],
    "grouped, scalar gains, in parts, forward multipliers": [
        "optim.rule=completep",
        "model.n_layer_base=1",
        "model.n_kv_head=2",
        "model.norm_scale=scalar",
        "model.remat=full",
        "optim.grad_accumulation_steps=2",
        "data.batch_size=16",
    ],
}


# What makes a step fast or small, each against the step of one device without it.
OPTIONS = {
    "overlap groups": ("relu", ["mesh.overlap_groups=2"]),
    "all-to-all": ("relu", ["mesh.overlap_groups=1", "mesh.reduce_scatter_via_all_to_all=true"]),
    "overlap groups and all-to-all": (
        "all options",
        ["mesh.overlap_groups=2", "mesh.reduce_scatter_via_all_to_all=true", "model.remat=dots"],
    ),
    "unrolled layers": ("all options", ["model.unroll_layers=true"]),
    "unrolled layers, rematerialized": ("relu", ["model.unroll_layers=true", "model.remat=dots"]),
    "remat=outputs": ("relu", ["model.remat=outputs"]),
    "remat=attention": ("all options", ["model.remat=attention", "mesh.reduce_scatter_via_all_to_all=true"]),
    "remat=dots": ("relu", ["model.remat=dots"]),
    "remat=full": ("all options", ["model.remat=full"]),
    "replicas": ("all options", ["mesh.replicas=2"]),
    "replicas, microbatches, overlapping": (
        "relu",
        ["mesh.replicas=2", "optim.grad_accumulation_steps=2", "mesh.reduce_scatter_via_all_to_all=true", "model.remat=dots"],
    ),
    "replicas, reduced once a step": ("relu", ["mesh.replicas=2", "optim.grad_accumulation_steps=2", "optim.grad_sync=step"]),
    "reduced once a step": ("all options", ["optim.grad_accumulation_steps=2", "optim.grad_sync=step"]),
    "reduced once a step, remat": (
        "relu",
        [
            "optim.grad_accumulation_steps=2",
            "optim.grad_sync=step",
            "model.remat=dots",
            "mesh.reduce_scatter_via_all_to_all=true",
        ],
    ),
}


def setting(model: str, x: int, y: int) -> Config:
    overrides = MODELS[model] if model in MODELS else [*MODELS[OPTIONS[model][0]], "data.batch_size=16", *OPTIONS[model][1]]
    return load([*TINY, *overrides, f"mesh.x={x}", f"mesh.y={y}"])


def params(config: Config) -> Transformer:
    """Weights of which no gain is one and no bias zero, so that a test sees them."""

    def draw(path: tuple, w: Weight) -> np.ndarray:
        rng = np.random.default_rng(len(jax.tree_util.keystr(path)) + w.size)
        scale = w.fan_in**-0.5 if w.is_matrix else 0.3
        return (scale * rng.standard_normal(w.shape) + w.role.endswith("gain")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, specs(config))


def loss_and_grads(
    model: str, x: int, y: int, *more: str, change: Callable[[Program], Program] = lambda program: program
) -> tuple[dict, Transformer]:
    config = load([*TINY, *MODELS[model], *more]) if more else setting(model, x, y)
    built = change(program(config, jax.devices()[: x * y * config.mesh.replicas], bos_id=1))
    rng = np.random.default_rng(0)
    shape = config.data.batch_size, config.data.seq_len
    batch = Batch(rng.integers(0, 250, shape, dtype=np.int32), rng.random(shape) < 0.8)
    return jax.device_get(jax.jit(make_loss_and_grads(built))(params(config), put_batch(batch, built.mesh)))


@cache
def unsharded(model: str) -> tuple[dict, Transformer]:
    return loss_and_grads(model, 1, 1)


@cache
def unsharded_without(option: str) -> tuple[dict, Transformer]:
    return loss_and_grads(OPTIONS[option][0], 1, 1, "data.batch_size=16", "mesh.x=1", "mesh.y=1")


def worst(ours: Transformer, theirs: Transformer) -> float:
    apart = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), ours, theirs)
    return max(jax.tree.leaves(apart))


def same(ours: tuple[dict, Transformer], theirs: tuple[dict, Transformer]) -> None:
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert worst(ours[1], theirs[1]) <= 1e-5


# Each kind of mesh and each model at least once; the rest is slow. The last model adds one mechanism that a mesh can break,
# heads that some y divide and others do not: two meshes show it.
FEW = [("relu", 8, 1), ("relu", 1, 8), ("all options", 2, 4), ("wide heads, multipliers", 2, 4)]
FEW += [(m, 2, 4) for m in MODELS if m.startswith("grouped")]
ALL = [(m, *mesh) for m in MODELS for mesh in MESHES[1:] if not m.startswith("grouped") or mesh in [(4, 2), (2, 4)]]


@pytest.mark.parametrize(("model", "x", "y"), slow_unless(FEW, ALL))
def test_loss_and_every_gradient_are_those_of_one_device(model: str, x: int, y: int) -> None:
    same(loss_and_grads(model, x, y), unsharded(model))


def meshes_of(option: str) -> list[tuple[int, int]]:
    """Those that eight devices suffice for."""
    return [(x, y) for x, y in MESHES if x * y * setting(option, x, y).mesh.replicas <= 8]


# An option of each kind on one mesh; the others, and all other meshes, are slow.
FEW_OPTIONS = [
    ("overlap groups and all-to-all", 4, 2),
    ("remat=attention", 4, 2),
    ("replicas, microbatches, overlapping", 2, 2),
    ("unrolled layers, rematerialized", 8, 1),  # the default on GPUs
]
ALL_OPTIONS = [(option, *mesh) for option in OPTIONS for mesh in meshes_of(option)]


@pytest.mark.parametrize(("option", "x", "y"), slow_unless(FEW_OPTIONS, ALL_OPTIONS))
def test_no_option_of_the_step_changes_loss_or_any_gradient(option: str, x: int, y: int) -> None:
    same(loss_and_grads(option, x, y), unsharded_without(option))


def test_a_slice_sent_to_the_wrong_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an all-to-all that adds up another device's slices."""
    real = collectives._reduce_scatter_y
    wrong = lambda x, via: real(jax.numpy.roll(x, x.shape[2] // 2, axis=2), via)  # noqa: E731
    monkeypatch.setattr(collectives, "_reduce_scatter_y", wrong)
    _, grads = loss_and_grads("all-to-all", 4, 2)
    assert worst(grads, unsharded_without("all-to-all")[1]) > 0.1


def test_a_lost_sum_over_replicas_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "psum", lambda x, axes, psum=jax.lax.psum: psum(x, axes) if axes != "z" else pmean(x))

    def pmean(x: jax.Array) -> jax.Array:
        return jax.lax.pmean(x, "z")

    _, grads = loss_and_grads("replicas", 2, 2)
    assert worst(grads, unsharded_without("replicas")[1]) > 0.1


def test_a_lost_sum_over_devices_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the sum over x in a weight's gradient, the loss is the same and the gradients are not."""

    def no_sum(grad: jax.Array, spec: Weight, reduce: object) -> jax.Array:
        dim = spec.dim_on("x")
        if dim is None or jax.lax.axis_size("x") == 1:
            return grad
        size = grad.shape[dim] // jax.lax.axis_size("x")
        return jax.lax.dynamic_slice_in_dim(grad, jax.lax.axis_index("x") * size, size, dim)

    monkeypatch.setattr(collectives, "scatter_x", no_sum)
    metrics, grads = loss_and_grads("relu", 2, 1)
    want, want_grads = unsharded("relu")
    assert metrics["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert worst(grads, want_grads) > 0.1


def bits(state: object) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]


@cache
def start_on(x: int, y: int, seed: int = 0) -> list[bytes]:
    config = load([*TINY, f"mesh.x={x}", f"mesh.y={y}", f"seed={seed}"])
    return bits(program(config, make_mesh(config.mesh, jax.devices()[: x * y])).init_state())


@pytest.mark.parametrize(("x", "y"), slow_unless([(4, 2)], [(2, 1), (1, 2), (4, 2), (1, 8)]))
def test_start_is_the_same_bit_for_bit_on_every_mesh(x: int, y: int) -> None:
    assert start_on(x, y) == start_on(1, 1)


def test_another_seed_is_another_start() -> None:
    assert start_on(4, 2, seed=1) != start_on(4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("x", "y", "optimizer"), [(4, 2, "adamw"), (2, 4, "lion")])
def test_every_matrix_and_its_moments_rest_once(x: int, y: int, optimizer: str) -> None:
    overrides = [*TINY, *MODELS["all options"], f"mesh.x={x}", f"mesh.y={y}", f"optim.name={optimizer}"]
    config = load(overrides)
    mesh = make_mesh(config.mesh)
    state = program(config, mesh).init_state()
    batch = put_batch(Batch(np.zeros((8, 16), np.int32), np.ones((8, 16), bool)), mesh)
    weights = specs(config)
    shapes = {w.shape for w in jax.tree.leaves(weights) if w.is_matrix}
    for when in ("at the start", "after a step"):
        matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes]
        copies = {"adamw": 3, "lion": 2}[optimizer]  # weight and moments
        assert len(matrices) == copies * sum(w.is_matrix for w in jax.tree.leaves(weights)), when
        for leaf in matrices:
            assert leaf.sharding.spec != PartitionSpec(), when
            held = [shard.data.nbytes for shard in leaf.addressable_shards]
            assert held == [leaf.nbytes // (x * y)] * (x * y), f"{leaf.shape} {when}"
        state, _ = make_train_step(program(config, mesh, bos_id=1))(state, batch)
