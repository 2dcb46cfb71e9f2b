"""The whole model: causal, of the size and cost that formulas give, and the same however its work is cut up."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import program, specs

from mutransformer import mup
from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import Batch
from mutransformer.model.weights import flops_per_token
from mutransformer.sharding.mesh import make_mesh
from mutransformer.training.program import scaling_of
from mutransformer.training.step import make_eval_step, make_logits, make_loss_and_grads

BOS, B, T, V = 0, 2, 128, 257  # as many ids as a batch has positions; T takes attention in more than one block


def make(*args: str) -> Config:
    return load(
        [
            "model.d_model=16",
            "model.d_head=4",
            "model.n_layer=2",
            "model.n_kv_head=2",
            f"model.n_vocab={V}",
            "model.vocab_multiple=8",
            "model.biases=true",
            "precision.compute=float32",
            f"data.seq_len={T}",
            f"data.batch_size={B}",
            "mesh.x=1",
            *args,
        ]
    )


def mesh_of(config: Config) -> jax.sharding.Mesh:
    return make_mesh(config.mesh, jax.devices()[:1])


def weights_of(config: Config) -> Any:
    """Weights at their initial scale, vectors not at one and zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape) * w.fan_in**-0.5, jnp.float32),
        specs(config),
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Every id but bos once, so that a row of the embedding is a position; most of the second row masked out."""
    tokens = 1 + np.random.default_rng(1).permutation(B * T).reshape(B, T).astype(np.int32)
    mask = np.ones((B, T), np.bool_)
    mask[1, 40:] = False
    return Batch(jnp.asarray(tokens), jnp.asarray(mask))


@pytest.fixture(scope="module")
def base(batch) -> tuple[Any, Any]:
    return loss_and_grads(make(), batch)


def loss_and_grads(config: Config, batch: Batch) -> tuple[Any, Any]:
    return jax.jit(make_loss_and_grads(program(config, mesh_of(config), BOS)))(weights_of(config), batch)


def test_a_position_sees_only_what_is_before_it(batch):
    config = make()
    logits, weights = make_logits(program(config, mesh_of(config), BOS)), weights_of(config)

    @jax.jit
    def seen(row: Any, t: Any) -> jax.Array:
        """For each row of the embedding, whether the logits of a position depend on it."""
        grad = jax.grad(lambda w: jnp.sum(jnp.sin(logits(w, batch.tokens)[row, t])))(weights)
        return jnp.any(grad.embed != 0, axis=-1)

    tokens = np.asarray(batch.tokens)
    for row, t in ((0, 0), (0, 70), (1, T - 1)):
        expected = np.zeros(config.model.padded_vocab, np.bool_)
        expected[[BOS, *tokens[row, :t]]] = True
        assert np.array_equal(seen(row, t), expected)


def test_the_loss_is_the_cross_entropy_of_the_logits(batch, base):
    config = make()
    logits = np.asarray(make_logits(program(config, mesh_of(config), BOS))(weights_of(config), batch.tokens), np.float64)[..., :V]
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    metrics, _ = base
    assert float(metrics["loss"]) == pytest.approx(each[mask].mean(), rel=1e-5)
    assert float(metrics["objective"]) == pytest.approx(each[mask].mean(), rel=1e-5)
    assert abs(each.mean() / each[mask].mean() - 1) > 1e-4

    total, count = make_eval_step(program(config, mesh_of(config), BOS))(weights_of(config), batch)
    assert (float(total), int(count)) == (pytest.approx(each[mask].sum(), rel=1e-5), mask.sum())


@pytest.mark.parametrize(
    "settings",
    [
        ("model.remat=full", "model.head_chunk=37"),
        ("model.unroll_layers=false",),
        pytest.param(("optim.grad_accumulation_steps=2", "model.head_chunk=1000"), marks=pytest.mark.slow),
    ],
)
def test_how_the_work_is_cut_up_changes_nothing(settings, batch, base):
    config = make(*settings)
    far = distances(loss_and_grads(config, batch), base)
    assert max(far.values()) < 5e-6, far  # the order of float32 sums; the bias of keys has a gradient near zero
    traced = [
        str(jax.make_jaxpr(make_loss_and_grads(program(c, mesh_of(c), BOS)))(weights_of(c), batch)) for c in (make(), config)
    ]
    assert traced[0] != traced[1]


def test_what_is_computed_changes_all(batch, base):
    far = distances(loss_and_grads(make("model.qk_scale=0.26"), batch), base)
    assert min(far.values()) > 1e-5


def distances(ours: Any, theirs: Any) -> dict[str, float]:
    """|ours - theirs| / |theirs|, by place in the tree."""
    paths = jax.tree_util.tree_leaves_with_path(theirs)
    pairs = {
        jax.tree_util.keystr(p): (np.asarray(a), np.asarray(b)) for (p, b), a in zip(paths, jax.tree.leaves(ours), strict=True)
    }
    return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize(("width", "layers", "vocab"), [(128, 6, 4096), (256, 3, 5000), (512, 1, 300)])
def test_number_of_parameters_and_operations(width, layers, vocab):
    config = load([f"model.d_model={width}", f"model.n_layer={layers}", f"model.n_vocab={vocab}", "data.seq_len=100"])
    padded = math.ceil(vocab / 128) * 128
    in_layers = 12 * layers * width**2
    assert sum(w.size for w in jax.tree.leaves(specs(config))) == in_layers + 2 * padded * width
    # 2 a multiplication and addition, thrice for forward and backward; two products of a query with T positions a layer.
    attention = 3 * 2 * 2 * layers * width * 100
    assert flops_per_token(specs(config), config.model, 100) == 6 * (in_layers + padded * width) + attention


def test_number_of_parameters_of_variants():
    def count(*args: str) -> int:
        return sum(w.size for w in jax.tree.leaves(specs(load(["model.n_vocab=4096", *args]))))

    plain, M, L, D = count(), 128, 6, 64
    assert count("model.n_kv_head=1") == plain - L * 2 * M * D
    assert count("model.activation=swiglu") == plain + L * 4 * M * M
    assert count("model.norm_scale=vector") == plain + (2 * L + 1) * M
    assert count("model.norm_scale=scalar", "model.embed_norm=true", "model.qk_norm=true") == plain + 4 * L + 2
    assert count("model.biases=true") == plain + L * (3 * M + M + 4 * M + M) + 4096


def test_an_untrained_model_knows_nothing():
    config = load([str(Path(__file__).parents[1] / "configs/small.yaml"), "data.batch_size=4", "data.seq_len=32", "mesh.x=1"])
    config = config.with_vocab(config.data.vocab_size)
    weights = jax.jit(lambda: mup.init_weights(specs(config), scaling_of(config), config.seed))()
    tokens = np.random.default_rng(0).integers(0, config.data.vocab_size, (4, 32), dtype=np.int32)
    batch = Batch(jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.bool_))
    total, count = make_eval_step(program(config, mesh_of(config), BOS))(weights, batch)
    loss = float(total) / int(count)
    assert loss == pytest.approx(math.log(4096), rel=0.02)
