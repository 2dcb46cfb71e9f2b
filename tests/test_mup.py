"""Initial scale, learning rate and eps follow from a weight's role and global width as in Lingle's table, from nothing else."""

import math
from typing import Any, get_args

import jax
import numpy as np
import pytest
from programs import block_specs, specs

from mutransformer.config.load import load
from mutransformer.config.optim import Rule
from mutransformer.config.schema import Config
from mutransformer.model.weights import Transformer
from mutransformer.mup import RULES, Role, decay_multiplier, eps_multiplier, init_std, init_weights, lr_multiplier
from mutransformer.sharding.spec import Weight
from mutransformer.training.program import scaling_of

M, P, F, HD = 96, 64, 144, 96  # width, base width, feed-forward width, heads x their width


def make(*args: str, rule: str = "mup") -> Config:
    """Without the factor on the unembedding's rate, which is no part of a rule."""
    return load(
        [
            f"model.d_model={M}",
            f"model.d_base={P}",
            "model.d_head=8",
            "model.ff_multiple=1.5",
            "model.n_layer=2",
            "model.n_kv_head=2",
            "model.n_vocab=512",
            "model.biases=true",
            "model.norm_scale=vector",
            f"optim.rule={rule}",
            "optim.lr_factors.output=1",
            *args,
        ]
    )


def named(config: Config) -> dict[str, Weight]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): w
        for path, w in jax.tree_util.tree_leaves_with_path(specs(config))
    }


# One line a weight: std; factor on the learning rate by rule. lr of abs_mup is 1 / fan-in, of mup P / M.
TABLE = {
    "embed": (1.0, 1.0, 1.0, 1.0),
    "blocks.w_q": (1 / math.sqrt(M), 1.0, P / M, 1 / M),
    "blocks.w_k": (1 / math.sqrt(M), 1.0, P / M, 1 / M),
    "blocks.w_v": (1 / math.sqrt(M), 1.0, P / M, 1 / M),
    "blocks.w_o": (1 / math.sqrt(HD), 1.0, P / M, 1 / HD),
    "blocks.w_up": (1 / math.sqrt(M), 1.0, P / M, 1 / M),
    "blocks.w_down": (1 / math.sqrt(F), 1.0, P / M, 1 / F),
    "unembed": (1 / M, 1.0, P / M, 1 / M),
    "blocks.attn_norm": (0.0, 1.0, 1.0, 1.0),
    "blocks.b_q": (0.0, 1.0, 1.0, 1.0),
    "b_unembed": (0.0, 1.0, 1.0, 1.0),
    "final_norm": (0.0, 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize(("rule", "column"), [("sp", 1), ("mup", 2), ("abs_mup", 3)])
def test_the_table(rule, column):
    config = make(rule=rule)
    weights = named(config)
    for name, row in TABLE.items():
        std = 1 / math.sqrt(M) if (rule, name) == ("sp", "unembed") else row[0]
        assert init_std(weights[name], scaling_of(config)) == pytest.approx(std, rel=1e-14), name
        assert lr_multiplier(weights[name], scaling_of(config)) == pytest.approx(row[column], rel=1e-14), name
        assert eps_multiplier(weights[name], scaling_of(config)) == 1.0, name


def test_every_weight_of_a_role_goes_by_the_same_row():
    config = make("model.activation=swiglu", "model.qk_norm=true", "model.embed_norm=true")
    rates: dict[str, set[float]] = {}
    for w in named(config).values():
        rates.setdefault(w.role, set()).add(lr_multiplier(w, scaling_of(config)))
    vectors = dict.fromkeys(("gain", "qk_gain", "bias", "outer_gain", "outer_bias"), {1.0})
    assert rates == {"input": {1.0}, "hidden": {P / M}, "residual": {P / M}, "output": {P / M}, **vectors}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("muon", [False, True])
def test_a_factor_multiplies_the_rates_of_its_kind_of_weight_alone(rule: str, muon: bool) -> None:
    """Whatever the width, and neither eps nor decay."""
    factors = {"input": 2.0, "hidden": 3.0, "output": 5.0}
    roles = {"input": "input", "hidden": "hidden", "residual": "hidden", "output": "output"}
    for width in (64, 96):
        args = [f"model.d_model={width}", *["optim.name=muon"] * muon]
        plain, set_ = make(*args, rule=rule), make(*args, *(f"optim.lr_factors.{k}={v}" for k, v in factors.items()), rule=rule)
        before, after = scaling_of(plain), scaling_of(set_)
        for w in named(plain).values():
            assert lr_multiplier(w, after) == factors.get(roles.get(w.role, ""), 1.0) * lr_multiplier(w, before)
            assert eps_multiplier(w, after) == eps_multiplier(w, before)
            assert decay_multiplier(w, after) == decay_multiplier(w, before)


def test_the_unembedding_learns_four_times_as_fast_by_default() -> None:
    """At every width, with every rule but the standard one."""
    for width in (64, 512):
        for rule in get_args(Rule):
            plain, default = (make(f"model.d_model={width}", f"optim.lr_factors.output={f}", rule=rule) for f in ("1", "null"))
            for name, w in named(plain).items():
                ratio = lr_multiplier(w, scaling_of(default)) / lr_multiplier(w, scaling_of(plain))
                assert ratio == (4 if name == "unembed" and rule != "sp" else 1), name


@pytest.mark.parametrize(("rule", "hidden"), [("mup", P / M), ("abs_mup", 1 / M)])
def test_eps_scales_like_the_rate_if_asked(rule, hidden):
    config = make("optim.eps_scaling=true", rule=rule)
    weights = named(config)
    assert eps_multiplier(weights["blocks.w_q"], scaling_of(config)) == pytest.approx(hidden, rel=1e-14)
    assert (
        eps_multiplier(weights["embed"], scaling_of(config))
        == eps_multiplier(weights["blocks.attn_norm"], scaling_of(config))
        == 1.0
    )


@pytest.mark.parametrize("width", [64, 80, 200, 1000])
def test_a_ratio_of_widths_is_exact(width):
    config = make(f"model.d_model={width}", "model.d_head=8", "model.n_kv_head=null", "model.ff_multiple=2.7")
    weights = named(config)
    assert {lr_multiplier(weights[n], scaling_of(config)) for n in ("blocks.w_q", "blocks.w_o", "blocks.w_down", "unembed")} == {
        (width / P) ** -1
    }


def test_at_the_base_width_nothing_is_scaled():
    at_base, standard = make(f"model.d_base={M}"), make(f"model.d_base={M}", rule="sp")
    ours, theirs = ({n: lr_multiplier(w, scaling_of(c)) for n, w in named(c).items()} for c in (at_base, standard))
    assert ours == theirs
    assert {n: lr_multiplier(w, scaling_of(make())) for n, w in named(make()).items()} != theirs


@pytest.mark.parametrize(
    ("start", "std"), [("rule", 1 / M), ("mup", 1 / M), ("base", P**0.5 / M), ("sp", M**-0.5), ("zero", 0.0)]
)
def test_the_unembedding_starts_as_told(start, std):
    config = make(f"model.unembed_init={start}")
    assert init_std(named(config)["unembed"], scaling_of(config)) == pytest.approx(std, rel=1e-14)
    standard = make(f"model.unembed_init={start}", rule="sp")
    assert init_std(named(standard)["unembed"], scaling_of(standard)) == pytest.approx(
        M**-0.5 if start == "rule" else std, rel=1e-14
    )


def test_an_unknown_role_is_an_error():
    stray = Weight((), 0, 1, "gain")
    object.__setattr__(stray, "role", "bent")  # past the frozen dataclass and the type check
    with pytest.raises(KeyError, match="bent"):
        lr_multiplier(stray, scaling_of(make()))


def test_every_parametrization_knows_every_role():
    roles = set(get_args(Role))
    assert roles == {w.role for w in named(make("model.qk_norm=true")).values()}
    assert {rule: set(table.rows) for rule, table in RULES.items()} == dict.fromkeys(get_args(Rule), roles)


def test_gains_and_biases_decay_only_if_asked():
    config, all_of_them = make(), make("optim.decay_vectors=true")
    assert {w.role for w in named(config).values() if decay_multiplier(w, scaling_of(config))} == {
        "input",
        "hidden",
        "residual",
        "output",
    }
    assert all(decay_multiplier(w, scaling_of(all_of_them)) == 1 for w in named(config).values())


@pytest.mark.parametrize("y", [2, 3, 4, 8])
def test_sharding_scales_nothing(y):
    def numbers(config: Config) -> dict[str, Any]:
        return {
            n: (w.shape, w.fan_in, w.role, init_std(w, scaling_of(config)), lr_multiplier(w, scaling_of(config)))
            for n, w in named(config).items()
        }

    for rule in ("mup", "abs_mup"):
        assert numbers(make(f"mesh.y={y}", rule=rule)) == numbers(make(rule=rule))


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    return draw(make())


def draw(config: Config) -> dict[str, np.ndarray]:
    weights = init_weights(specs(config), scaling_of(config), config.seed)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(a)
        for path, a in jax.tree_util.tree_leaves_with_path(weights)
    }


def test_weights_are_normal_with_mean_zero_and_their_std(drawn):
    for name, (std, *_) in TABLE.items():
        a = drawn[name].astype(np.float64)
        assert a.dtype == np.float64 and drawn[name].dtype == np.float32
        if std:
            n = a.size
            assert abs(a.mean()) < 4 * std / math.sqrt(n), name
            assert abs(a.std() / std - 1) < 4 / math.sqrt(2 * n), name
            assert abs(np.mean((a / std) ** 4) - 3) < 4 * math.sqrt(96 / n), name
        else:
            assert np.all(a == (1 if name.endswith("_norm") else 0)), name


def test_no_two_weights_or_layers_are_alike(drawn):
    layers = [layer for name in TABLE if ".w_" in name for layer in drawn[name]]
    assert len(layers) == 12
    flat = np.array([layer.reshape(-1)[:1000] / layer.std() for layer in layers])
    alike = np.abs(flat @ flat.T / flat.shape[1] - np.eye(len(flat)))
    assert alike.max() < 0.2


def test_zero_where_told():
    zero = draw(make("model.q_init=zero", "model.residual_init=zero", "model.unembed_init=zero"))
    assert {name for name, a in zero.items() if a.ndim > 1 and not a.any() and not name.startswith("blocks.b_")} == {
        "blocks.w_q",
        "blocks.w_o",
        "blocks.w_down",
        "unembed",
    }


def test_another_weights_existence_moves_no_draw(drawn):
    plain = draw(make("model.biases=false", "model.norm_scale=none"))
    more = draw(make("model.activation=swiglu", "model.qk_norm=true", "model.embed_norm=true"))
    assert set(plain) < set(drawn) < set(more)
    for name, a in plain.items():
        assert np.array_equal(a, drawn[name]) and np.array_equal(a, more[name]), name


def test_the_seed_moves_every_draw(drawn):
    other = draw(make("seed=1"))
    assert all(not np.any(other[name] == drawn[name]) for name, (std, *_) in TABLE.items() if std)


def test_a_tree_of_one_kind_gives_a_tree_of_another():
    config = make()
    tree: Transformer[Any] = jax.tree.map(lambda w: lr_multiplier(w, scaling_of(config)), specs(config))
    assert tree.embed == 1.0 and tree.blocks.w_q == pytest.approx(P / M)
    assert block_specs(config).w_gate is None and tree.blocks.w_gate is None


@pytest.mark.parametrize("width", [64, 128])
def test_heads_that_are_wider_together_than_the_model(width: int) -> None:
    """The result of attention is summed over all heads: fan-in n_head * d_head, in a fixed ratio to the width."""
    sizes = [f"model.d_model={width}", "model.d_base=32", "model.d_head=16", "model.attention_multiple=2.5", "model.n_vocab=64"]
    scaling, absolute = (scaling_of(load([*sizes, f"optim.rule={rule}"])) for rule in ("mup", "abs_mup"))
    blocks = specs(load(sizes)).blocks
    assert (blocks.w_q.fan_in, blocks.w_q.fan_out) == (width, 2.5 * width) == (blocks.w_o.fan_out, blocks.w_o.fan_in)
    assert init_std(blocks.w_o, scaling) == (2.5 * width) ** -0.5 and init_std(blocks.w_q, scaling) == width**-0.5
    assert lr_multiplier(blocks.w_o, scaling) == lr_multiplier(blocks.w_q, scaling) == 32 / width
    assert lr_multiplier(blocks.w_o, absolute) == pytest.approx(1 / (2.5 * width))
    assert lr_multiplier(blocks.w_q, absolute) == 1 / width


def test_absolute_rates_know_no_rounding_of_the_feed_forward_width() -> None:
    config = load(["model.d_model=64", "model.d_head=16", "model.ff_multiple=2.67", "model.n_vocab=64", "optim.rule=abs_mup"])
    blocks = specs(config).blocks
    assert blocks.w_down.fan_in == 170
    assert 1 / lr_multiplier(blocks.w_down, scaling_of(config)) == pytest.approx(2.67 * 64)
    assert 1 / lr_multiplier(blocks.w_up, scaling_of(config)) == pytest.approx(64)
