"""Exact laws between parametrizations: where two say the same, training is the same; and each says what its paper does."""

import math
from functools import cache
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
from cases import slow_unless
from programs import program, specs

from mutransformer import mup
from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import Batch
from mutransformer.sharding.mesh import make_mesh, put_batch
from mutransformer.sharding.spec import Weight
from mutransformer.training.program import scaling_of
from mutransformer.training.step import make_train_step

TINY = [
    "model.d_model=32",
    "model.d_head=8",
    "model.n_layer=3",
    "model.n_vocab=60",
    "model.vocab_multiple=4",
    "data.seq_len=16",
    "data.batch_size=8",
    "precision.compute=float32",
    "optim.warmup_steps=2",
    "steps=20",
    "optim.lr_factors.output=1",  # as in the papers' tables
    "optim.lr=0.05",
    "optim.eps=1e-30",  # eps 0 but for weights without any gradient: 0 / 0
]
STEPS = 6


@cache
def train(*args: str, mesh: tuple[int, int] = (1, 1)) -> tuple[list[float], dict[str, np.ndarray]]:
    """(losses, weights at the end) of a few steps."""
    config = load([*TINY, *args, f"mesh.x={mesh[0]}", f"mesh.y={mesh[1]}"])
    grid = make_mesh(config.mesh, jax.devices()[: mesh[0] * mesh[1]])
    step, state, losses = make_train_step(program(config, grid, bos_id=1)), program(config, grid).init_state(), []
    rng = np.random.default_rng(0)
    shape = config.data.batch_size, config.data.seq_len
    for _ in range(STEPS):
        tokens = np.minimum(rng.geometric(0.1, shape), 59).astype(np.int32)
        state, metrics = step(state, put_batch(Batch(tokens, np.ones(shape, np.bool_)), grid))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    return losses, named(jax.device_get(state.params))


def named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="."): a for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest relative distance of two weights of the same name."""
    return max(float(np.linalg.norm(ours[n] - theirs[n]) / np.linalg.norm(theirs[n])) for n in theirs)


def same(one: tuple[list[float], dict[str, np.ndarray]], other: tuple[list[float], dict[str, np.ndarray]]) -> bool:
    """Bit for bit."""
    return one[0] == other[0] and all(np.array_equal(one[1][n], other[1][n]) for n in other[1])


ALL = list(product(["mup", "mup_table8", "completep", "completed_p"], ["adamw", "lion", "muon"]))


@pytest.mark.parametrize(("rule", "optimizer"), slow_unless([("mup", "adamw")], ALL))
def test_at_the_base_width_it_is_the_standard_parametrization(rule, optimizer):
    # The unembedding's start is the one setting that differs there: 1 / M, where sp has M^-1/2.
    base = ["model.d_base=32", f"optim.name={optimizer}", "optim.weight_decay=0.01", "optim.decay=coupled"]
    start = "model.unembed_init=zero" if rule in ("mup_table8", "completep") else "model.unembed_init=sp"
    standard = train(*base, start, "optim.rule=sp")
    assert same(train(*base, start, f"optim.rule={rule}"), standard)
    if optimizer == "adamw":
        assert not same(train(*base, start, f"optim.rule={rule}", "model.d_base=16"), standard)


@pytest.mark.slow
@pytest.mark.parametrize("base", [8, 24, 100])
def test_table_8_is_table_3(base):
    # Adam does not feel the scale of a gradient, but clipping by the global norm does; so does eps.
    settings = [f"model.d_base={base}", "optim.lr=0.01", "optim.clip_norm=0", "model.norm_scale=vector"]
    losses, weights = train(*settings, "optim.rule=mup")
    losses8, weights8 = train(*settings, "optim.rule=mup_table8")
    scaled = weights8 | {"unembed": weights8["unembed"] * np.float32(base / 32)}  # its multiplier
    assert np.abs(np.array(losses8) - losses).max() < 1e-5
    assert distance(scaled, weights) < 1e-5
    assert distance(weights8, weights) > 0.01
    other, _ = train(*settings, "optim.rule=mup_table8", "optim.eps=0.001")
    assert np.abs(np.array(other) - losses).max() > 1e-4


@pytest.mark.slow
def test_completed_p_at_unchanged_depth_batch_and_tokens_is_its_rule_for_width():
    now = 8 * 16
    settings = ["optim.rule=completed_p", "model.d_base=16", "model.qk_norm=true", "model.norm_scale=vector", "model.biases=true"]
    width_only = train(*settings)
    unchanged = ["model.n_layer_base=3", f"optim.batch_base={now}", f"optim.tokens_base={now * 20}", "optim.depth_alpha=0.5"]
    assert same(train(*settings, *unchanged), width_only)
    for changed in ("model.n_layer_base=2", f"optim.batch_base={2 * now}", f"optim.tokens_base={now * 10}"):
        assert not same(train(*settings, *unchanged, changed), width_only), changed
    # And that rule is mup's, where neither eps nor decay matters.
    assert same(train(*settings, "optim.rule=mup"), width_only)
    assert not same(train(*settings, "optim.rule=mup", "optim.eps=0.001"), train(*settings, "optim.eps=0.001"))


@pytest.mark.slow
def test_completep_is_table_8_at_its_depth():
    settings = ["model.d_base=16", "model.qk_norm=true", "model.norm_scale=vector", "model.biases=true"]
    assert same(train(*settings, "optim.rule=completep"), train(*settings, "optim.rule=mup_table8"))
    assert not same(train(*settings, "optim.rule=completep", "model.n_layer_base=1"), train(*settings, "optim.rule=mup_table8"))


# m_N = 2, m_L = 3, alpha = 0.5, batch x 2, tokens x 8; per weight: multiplier, lr, eps, coupled decay.
N, L, A, B, D = 2.0, 3.0, 0.5, 2.0, 8.0
R = math.sqrt(B / D)
COMPLETEP = {  # arXiv 2505.01618, Table 1
    "embed": (1, 1, 1, 1),
    "blocks.w_q": (1, L ** (A - 1) / N, L**-A / N, N),
    "blocks.w_o": (L**-A, L ** (A - 1) / N, L**-A / N, N),
    "blocks.w_up": (1, L ** (A - 1) / N, L**-A / N, N),
    "blocks.w_down": (L**-A, L ** (A - 1) / N, L**-A / N, N),
    "blocks.attn_norm": (1, L ** (A - 1), L**-A / N, 1),
    "blocks.b_q": (1, L ** (A - 1), L**-A / N, 1),
    "blocks.q_norm": (1, L ** (A - 1), L**-A / N, 1),
    "final_norm": (1, 1, 1, 1),
    "unembed": (1 / N, 1, 1, 1),
}
COMPLETED_P = {  # arXiv 2512.22382, Table 1
    "embed": (1, R, 1 / N / R, R),
    "blocks.w_q": (1, L ** (A - 1) / N * R, L**-A / N / R, N * R),
    "blocks.w_o": (L**-A, L ** (A - 1) / N * R, L**-A / N / R, N * R),
    "blocks.w_up": (1, L ** (A - 1) / N * R, L**-A / N / R, N * R),
    "blocks.w_down": (L**-A, L ** (A - 1) / N * R, L**-A / N / R, N * R),
    "blocks.attn_norm": (1, L ** (A - 1) * R, L**-A / N / R, R),
    "blocks.b_q": (1, L ** (A - 1) * R, L**-A / N / R, R),
    "blocks.q_norm": (1, L ** (A - 1) * R, L**-A / R, R),
    "final_norm": (1, R, 1 / R, R),
    "b_unembed": (1, R, 1 / R, R),
    "unembed": (1, R / N, 1 / R, N * R),
}
TABLE_8 = {"embed": (1, 1, 1, 1), "blocks.w_q": (1, 1 / N, 1, 1), "blocks.w_o": (1, 1 / N, 1, 1), "unembed": (1 / N, 1, 1, 1)}
STD = {"mup_table8": 1 / 16, "completep": 1 / 16, "completed_p": 1 / 32}  # of the unembedding, at d_base 16


def full(rule: str, *args: str) -> Config:
    depth = [f"model.n_layer_base={1}", f"optim.depth_alpha={A}"] if rule in ("completep", "completed_p") else []
    horizon = ["optim.batch_base=64", "optim.tokens_base=320"] if rule == "completed_p" else []
    everything = ["model.norm_scale=vector", "model.biases=true", "model.qk_norm=true", "model.embed_norm=true"]
    decay = ["optim.decay=coupled", "optim.decay_vectors=true"]
    return load([*TINY, "model.d_base=16", *everything, *decay, f"optim.rule={rule}", *depth, *horizon, *args])


@pytest.mark.parametrize(("rule", "rows"), [("mup_table8", TABLE_8), ("completep", COMPLETEP), ("completed_p", COMPLETED_P)])
def test_the_published_table(rule, rows):
    config = full(rule)
    weights = named(specs(config))
    factors = (mup.forward_multiplier, mup.lr_multiplier, mup.eps_multiplier, mup.decay_multiplier)
    for name, row in rows.items():
        assert [factor(weights[name], scaling_of(config)) for factor in factors] == pytest.approx(row, rel=1e-12), name
    assert mup.init_std(weights["unembed"], scaling_of(config)) == pytest.approx(STD[rule], rel=1e-12)
    assert mup.init_std(weights["blocks.w_q"], scaling_of(config)) == pytest.approx(32**-0.5, rel=1e-12)
    assert mup.init_std(weights["embed"], scaling_of(config)) == 1.0


@pytest.mark.parametrize("rule", ["completep", "completed_p"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_coupled_decay_takes_in_a_step_does_not_grow_with_width(rule, optimizer):
    def taken(width: int) -> float:
        config = full(rule, f"optim.name={optimizer}", f"model.d_model={width}")
        w = named(specs(config))["blocks.w_q"]
        return mup.lr_multiplier(w, scaling_of(config)) * mup.decay_multiplier(w, scaling_of(config))

    assert taken(64) == pytest.approx(taken(16)) == pytest.approx(taken(256))


def betas(config: Config) -> tuple[float, float]:
    return mup.betas(config.optim.beta1, config.optim.beta2, scaling_of(config))


def test_betas_follow_batch_and_tokens():
    config = full("completed_p")
    assert betas(config) == pytest.approx((1 - 0.1 * B / D, 1 - 0.05 * B / D))
    assert betas(full("completep")) == (0.9, 0.95)


@pytest.mark.parametrize("rule", ["sp", "mup", "completed_p"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_exponents_of_batch_and_tokens(rule, optimizer):
    """They multiply every learning rate, and replace those of a rule that has its own; nothing else follows them."""
    args = [*TINY, f"optim.rule={rule}", f"optim.name={optimizer}", "optim.batch_exponent=0.25", "optim.tokens_exponent=0.3"]
    plain, tuned = load(args), load([*args, "optim.batch_base=64", "optim.tokens_base=320"])  # batch x 2, tokens x 8
    assert (tuned.batch_ratio, tuned.tokens_ratio) == (B, D)
    for name, w in named(specs(plain)).items():
        before, after = scaling_of(plain), scaling_of(tuned)
        assert mup.lr_multiplier(w, after) == pytest.approx(mup.lr_multiplier(w, before) * B**0.25 / D**0.3, rel=1e-12), name
        if rule != "completed_p":
            assert mup.eps_multiplier(w, after) == mup.eps_multiplier(w, before)
            assert mup.decay_multiplier(w, after) == mup.decay_multiplier(w, before)


def test_presets_are_what_their_papers_say():
    small = load(["small"])
    longer = ["steps=3200", f"optim.tokens_base={small.steps * small.tokens_per_step}"]

    def rate(*args: str) -> float:
        return mup.lr_multiplier(named(specs(config := load([*args, "model.n_vocab=64"])))["embed"], scaling_of(config))

    assert rate("small", "presets/delphi", *longer) == pytest.approx(4**-0.3)
    assert rate("small", "presets/completed_p", *longer) == pytest.approx(4**-0.5)
    assert load(["small", "presets/delphi"]).optim.warmup(800) == 80 and small.optim.warmup(800) == 200
    wide = load(["small", "presets/microsoft_mup", "model.d_model=512", "model.n_vocab=64"])
    unembed = named(specs(wide))["unembed"]
    assert mup.init_std(unembed, scaling_of(wide)) == pytest.approx(128**0.5 / 512)
    assert mup.lr_multiplier(unembed, scaling_of(wide)) == 1 / 4


def test_independent_decay_follows_batch_and_tokens_alone():
    config = full("completed_p", "optim.decay=independent")
    assert {mup.decay_multiplier(w, scaling_of(config)) for w in named(specs(config)).values()} == {B / D}


@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_the_exponents_that_are_free(decay):
    config = full("mup", f"optim.decay={decay}", "optim.decay_exponent=0.5", "optim.embed_lr_exponent=-0.5")
    for name, w in named(specs(config)).items():
        wide = w.role in ("hidden", "residual", "output")
        assert mup.decay_multiplier(w, scaling_of(config)) == pytest.approx(math.sqrt(N) if wide else 1.0), name
        assert mup.lr_multiplier(w, scaling_of(config)) == pytest.approx(
            1 / N if wide else N**-0.5 if name == "embed" else 1.0
        ), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("rule", list(mup.RULES))
def test_no_rule_knows_of_the_mesh(rule, optimizer):
    def numbers(y: int) -> dict[str, Any]:
        config = full(rule, f"optim.name={optimizer}", f"mesh.y={y}", "model.n_kv_head=2")
        factors = (mup.init_std, mup.forward_multiplier, mup.lr_multiplier, mup.eps_multiplier, mup.decay_multiplier)
        return {n: (w.shape, *(factor(w, scaling_of(config)) for factor in factors)) for n, w in named(specs(config)).items()}

    assert numbers(1) == numbers(2) == numbers(4)


@pytest.mark.slow
def test_muon_moves_a_layers_matrices_by_the_spectral_norm_that_lets_width_be():
    """Every singular value of an update is about lr x muon_lr x sqrt(fan_out / fan_in), each layer's own."""
    settings = ["optim.name=muon", "optim.warmup_steps=0", "optim.muon_lr=0.5", "model.d_base=16"]
    config = load([*TINY, *settings])
    grid = make_mesh(config.mesh, jax.devices()[:1])
    before = program(config, grid).init_state()
    start = named(jax.device_get(before.params))
    tokens = np.random.default_rng(0).integers(0, 60, (8, 16), dtype=np.int32)
    after, _ = make_train_step(program(config, grid, bos_id=1))(
        before, put_batch(Batch(tokens, np.ones((8, 16), np.bool_)), grid)
    )
    end, weights = named(jax.device_get(after.params)), named(specs(config))
    for name in ("blocks.w_q", "blocks.w_o", "blocks.w_up", "blocks.w_down"):
        w: Weight = weights[name]
        for layer in end[name] - start[name]:
            values = np.linalg.svd(layer.reshape(w.fan_in, w.fan_out), compute_uv=False)
            relative = values / (0.05 * 0.5 * math.sqrt(w.fan_out / w.fan_in))
            assert 0.6 < np.median(relative) < 1.3 and relative.max() < 1.3, (name, relative)
    moved = np.abs(end["unembed"] - start["unembed"]) / 0.05
    assert np.median(moved) == pytest.approx(0.5, rel=1e-3)  # Adam's first step: lr x P / M, whatever the gradient


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2), (2, 4)])
def test_muon_is_the_same_on_a_mesh(mesh):
    losses, weights = train("optim.name=muon", "model.d_base=16")
    sharded = train("optim.name=muon", "model.d_base=16", mesh=mesh)
    # Newton and Schulz's iteration magnifies the rounding of small singular values: its coefficient is 3.4, five times over.
    assert np.abs(np.array(sharded[0]) - losses).max() < 1e-4
    assert distance(sharded[1], weights) < 1e-3
