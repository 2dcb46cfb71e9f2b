"""The roles of weights are inferred from shapes, and what follows from them keeps training independent of width."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from pages import blocks
from short_runs import ROOT

from mutransformer import mup
from mutransformer.config.load import load
from mutransformer.model.weights import transformer_specs
from mutransformer.mup import RoleError
from mutransformer.training.program import scaling_of

KEY = jax.random.key(0)
infer = partial(mup.infer, base={"width": 64}, other={"width": 96})


def mlp(width: int, depth: int = 2) -> eqx.nn.MLP:
    return eqx.nn.MLP(20, 5, width, depth, key=KEY)


class PatchModel(eqx.Module):
    """A vision Transformer of one layer: patches by a convolution, attention, a feed-forward layer with experts, a classifier."""

    patches: eqx.nn.Conv2d
    positions: Array
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    experts_in: Array
    experts_out: Array
    router: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width: int, n_experts: int = 4):
        keys = iter(jax.random.split(KEY, 8))
        self.patches = eqx.nn.Conv2d(3, width, 4, 4, key=next(keys))
        self.positions = jax.random.normal(next(keys), (4, width))
        self.norm = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(width // 8, width, key=next(keys))
        self.experts_in = jax.random.normal(next(keys), (n_experts, width, 2 * width)) / width**0.5
        self.experts_out = jax.random.normal(next(keys), (n_experts, 2 * width, width)) / (2 * width) ** 0.5
        self.router = eqx.nn.Linear(width, n_experts, key=next(keys))
        self.head = eqx.nn.Linear(width, 10, key=next(keys))


class Recurrent(eqx.Module):
    embedding: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, width: int):
        a, b, c = jax.random.split(KEY, 3)
        self.embedding = eqx.nn.Embedding(30, width, key=a)
        self.cell = eqx.nn.GRUCell(width, width, key=b)
        self.head = eqx.nn.Linear(width, 30, key=c)


def roles_of(make: Callable[..., Any], **more: Any) -> dict[str, str]:
    return {path: leaf.role for path, leaf in infer(make, **more).leaves.items()}


def test_roles_of_an_mlp() -> None:
    assert roles_of(mlp) == {
        "layers.0.weight": "input",
        "layers.1.weight": "hidden",
        "layers.2.weight": "output",
        **{f"layers.{i}.bias": "vector" for i in range(3)},
    }


def test_roles_of_patches_attention_and_experts() -> None:
    found = roles_of(PatchModel, override={"positions": "input"})
    names = ("query_proj", "key_proj", "value_proj", "output_proj")
    assert {found.pop(f"attention.{name}.weight") for name in names} == {"hidden"}
    assert found == {
        "patches.weight": "input",
        "patches.bias": "vector",
        "positions": "input",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "experts_in": "hidden",
        "experts_out": "hidden",
        "router.weight": "output",
        "router.bias": "vector",
        "head.weight": "output",
        "head.bias": "vector",
    }


def test_roles_of_a_recurrent_model() -> None:
    assert roles_of(Recurrent) == {
        "embedding.weight": "input",
        "cell.weight_ih": "hidden",
        "cell.weight_hh": "hidden",
        "cell.bias": "vector",
        "cell.bias_n": "vector",
        "head.weight": "output",
        "head.bias": "vector",
    }


def test_roles_of_flax_like_names() -> None:
    """Plain dictionaries, with the names and layouts that Flax uses."""

    def make(width: int) -> dict[str, dict[str, Array]]:
        zeros = jnp.zeros
        return {
            "embed": {"embedding": zeros((30, width))},
            "norm": {"scale": zeros(width)},
            "up": {"kernel": zeros((width, 4 * width)), "bias": zeros(4 * width)},
            "head": {"kernel": zeros((width, 30)), "bias": zeros(30)},
        }

    assert roles_of(make) == {
        "embed.embedding": "input",
        "norm.scale": "vector",
        "up.kernel": "hidden",
        "up.bias": "vector",
        "head.kernel": "output",
        "head.bias": "vector",
    }


def transformer(*settings: str) -> Callable[..., Any]:
    """This project's Transformer as shapes alone."""

    def make(width: int, n_layer: int = 2) -> Any:
        c = load(["study", f"model.d_model={width}", f"model.n_layer={n_layer}", "model.n_vocab=1000", *settings])
        return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), transformer_specs(c.model))

    return make


@pytest.mark.parametrize(
    "settings",
    [
        ("model.activation=swiglu", "model.qk_norm=true", "model.norm_scale=vector", "model.embed_norm=true"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("model.d_head=16",), marks=pytest.mark.slow),
    ],
)
def test_the_transformer_inferred_from_shapes_is_the_one_declared(settings: tuple[str, ...]) -> None:
    """Roles, and the factors on learning rates and initial values. A residual write is a hidden matrix in rules for width."""
    depth = ({"n_layer": 2}, {"n_layer": 3})
    roles = infer(transformer(*settings), depth=depth, layout="in_out").at(width=256)
    shared = ("model.n_vocab=1000", "optim.lr_factors.output=1", *settings)
    base, wide = (load(["study", f"model.d_model={width}", *shared]) for width in (64, 256))
    factors = roles.factors("mup")
    weights = [jax.tree_util.tree_leaves_with_path(transformer_specs(config.model)) for config in (base, wide)]
    assert len(weights[0]) == len(factors)
    for (path, narrow), (_, w) in zip(*weights, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        declared = {"residual": "hidden"}.get(w.role, w.role) if w.is_matrix else "vector"
        assert roles.leaves[name].role in (declared, *["fixed"] * (w.role == "qk_gain")), name
        assert factors[name].lr == pytest.approx(mup.lr_multiplier(w, scaling_of(wide)), rel=1e-12), name
        if w.is_matrix:
            ratio = mup.init_std(w, scaling_of(wide)) / mup.init_std(narrow, scaling_of(base))
            own = 1.0 if w.role == "input" else (256 / 64) ** -0.5
            assert factors[name].init == pytest.approx(ratio / own, rel=1e-12), name


def test_what_shapes_cannot_tell_is_an_error_that_names_the_weight() -> None:
    raw = lambda width: {"head": jnp.zeros((width, 10)), "w": jnp.zeros((width, width))}  # noqa: E731
    with pytest.raises(
        RoleError, match=r"^head of shape \(64, 10\): one of its dims grows: input or output\? .*override=\{'head'"
    ):
        infer(raw)
    assert roles_of(raw, override={"head": "output"})["head"] == roles_of(raw, layout="in_out")["head"] == "output"
    assert roles_of(raw, layout="out_in")["head"] == "input"
    with pytest.raises(RoleError, match="^no weight has the path heads; there are head, w$"):
        infer(raw, override={"heads": "output"})
    with pytest.raises(RoleError, match="no weight grows"):
        infer(lambda width: mlp(64))
    three = lambda width: {"w": jnp.zeros((width, width, width))}  # noqa: E731
    with pytest.raises(RoleError, match="^w of shape .*: 3 of its dims grow"):
        infer(three)
    uneven = lambda width: {"w": jnp.zeros((width, width + 10))}  # noqa: E731
    with pytest.raises(RoleError, match="^w of shape .* different factors; give a layout"):
        infer(uneven).at(width=128)


def test_a_tied_matrix_is_an_error() -> None:
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, width: int):
            pair = (eqx.nn.Embedding(30, width, key=KEY), eqx.nn.Linear(width, 30, key=KEY))
            self.shared = eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight)

    with pytest.raises(RoleError, match="is shared"):
        infer(Tied)
    (path,) = (name for name in roles_of(Tied, override={"shared.pytree.0.weight": "input"}) if name.endswith("0.weight"))
    assert path == "shared.pytree.0.weight"


def test_equal_sizes_by_chance_do_not_grow() -> None:
    """The input has as many features as the base model is wide."""
    assert roles_of(lambda width: eqx.nn.Linear(64, width, key=KEY))["weight"] == "input"


def test_start_and_optimizer_at_the_base_width_are_the_models_own() -> None:
    roles, model = infer(mlp), mlp(64)
    started = mup.init(model, roles)
    assert eqx.tree_equal(started, model)
    params = eqx.filter(model, eqx.is_inexact_array)
    cases: list[tuple[Any, dict[str, Any]]] = [(optax.adamw, {"b2": 0.95}), (optax.sgd, {"momentum": 0.9}), (optax.lion, {})]
    for make, settings in cases:
        ours = mup.optimizer(roles, make, 0.01, **settings)
        theirs = make(0.01, **settings, **({} if make is optax.sgd else {"weight_decay": 0.0}))
        state, other = ours.init(params), theirs.init(params)
        for _ in range(2):
            updates, state = jax.jit(ours.update)(params, state, params)
            expected, other = jax.jit(theirs.update)(params, other, params)
            assert eqx.tree_equal(updates, expected)


def test_init_works_under_jit() -> None:
    roles = infer(mlp).at(width=128)
    traced = eqx.filter_jit(lambda model: mup.init(model, roles))(mlp(128))
    assert all(map(np.allclose, *(jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (traced, mup.init(mlp(128), roles)))))


def test_decay_removes_the_same_share_at_every_width() -> None:
    for width in (64, 256):
        roles = infer(mlp).at(width=width)
        params = eqx.filter(mlp(width), eqx.is_inexact_array)
        zeros = jax.tree.map(jnp.zeros_like, params)
        tx = mup.optimizer(roles, optax.adamw, lambda step: 0.5 / (1 + step), weight_decay=0.1)
        state = tx.init(params)
        for rate in (0.5, 0.25):
            updates: Any
            updates, state = jax.jit(tx.update)(zeros, state, params)
            assert jnp.allclose(updates.layers[1].weight, -0.1 * rate * params.layers[1].weight)
            assert not updates.layers[1].bias.any()


def test_misuse_is_an_error() -> None:
    roles = infer(mlp).at(width=128)
    started = mup.init(mlp(128), roles)
    with pytest.raises(RoleError, match=r"^layers.0.weight: was rescaled by mup.init before$"):
        mup.init(started, roles)
    with pytest.raises(RoleError, match=r"has shape \(64, 20\), but the roles are for \(128, 20\): use roles.at"):
        mup.init(mlp(64), roles)
    tx = mup.optimizer(roles, optax.adam, 0.01)
    with pytest.raises(RoleError, match="use roles.at"):
        tx.init(eqx.filter(mlp(64), eqx.is_inexact_array))
    with pytest.raises(RoleError, match="differ in weights: layers.3.bias"):
        mup.init(mlp(128, 3), roles)
    with pytest.raises(RoleError, match="lbfgs: no rule is known"):
        mup.optimizer(roles, optax.lbfgs, 0.01)
    with pytest.raises(RoleError, match="mup_table8 multiplies in the forward pass"):
        roles.factors("mup_table8")
    with pytest.raises(RoleError, match="rule nonsense: must be one of sp, mup"):
        roles.factors("nonsense")


def test_deeper_models_have_roles_too() -> None:
    assert set(infer(mlp).at(width=128, depth=5).leaves) == {f"layers.{i}.{w}" for i in range(6) for w in ("weight", "bias")}


def test_the_table_says_what_was_decided_and_why() -> None:
    lines = infer(mlp).at(width=256).table().splitlines()
    assert lines[0].split() == ["weight", "shape", "role", "init", "x", "lr", "x", "because"]
    assert lines[5].split() == "layers.2.weight 5 256* output 0.5 0.25 only its inputs grow".split()


def test_the_example_of_the_docs_runs_and_prints_its_table() -> None:
    page, scope = ROOT / "docs/mup.md", dict[str, Any]()
    (code,) = [code for heading, code in blocks(page, "python") if heading == "Your own model"]
    (table,) = [text for heading, text in blocks(page, "text") if heading == "Your own model"]
    exec(code, scope)
    assert scope["roles"].table() == table.rstrip("\n")


WIDTHS = (64, 512)


def changes(make_optimizer: Callable[[mup.Roles], Any], rule: str, steps: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Root mean squares at each width: of the change of the hidden layers' outputs and of the logits by a few steps."""
    hidden, logits = [], []
    x, y = jax.random.normal(jax.random.key(1), (32, 20)), jax.random.normal(jax.random.key(2), (32, 5))

    def forward(model: eqx.nn.MLP, x: Array) -> tuple[Array, Array]:
        for layer in model.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return x, model.layers[-1](x)

    for width in WIDTHS:
        roles = infer(partial(mlp, depth=3)).at(width=width)
        model = mup.init(eqx.filter_jit(partial(mlp, width, 3))(), roles, rule)
        tx = make_optimizer(roles)
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        outputs = eqx.filter_jit(lambda model: jax.vmap(partial(forward, model))(x))
        before = outputs(model)

        @eqx.filter_jit
        def step(model: Any, state: Any, tx: Any = tx) -> Any:
            loss = lambda m: jnp.mean((jax.vmap(partial(forward, m))(x)[1] - y) ** 2)  # noqa: E731
            updates, state = tx.update(eqx.filter_grad(loss)(model), state, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), state

        for _ in range(steps):
            model, state = step(model, state)
        after = outputs(model)
        for found, a, b in zip((hidden, logits), after, before, strict=True):
            found.append(float(jnp.sqrt(jnp.mean((a - b) ** 2))))
    return np.array(hidden), np.array(logits)


@pytest.mark.parametrize(("make", "lr"), [(optax.adam, 2**-9), pytest.param(optax.sgd, 0.1, marks=pytest.mark.slow)])
def test_a_step_changes_activations_alike_at_every_width_and_sp_does_not(make: Any, lr: float) -> None:
    for rule in ("mup", "sp"):
        hidden, logits = changes(lambda roles, rule=rule: mup.optimizer(roles, make, lr, rule), rule)
        slopes = [np.polyfit(np.log(WIDTHS), np.log(sizes), 1)[0] for sizes in (hidden, logits)]
        assert all(abs(slope) < 0.15 for slope in slopes) == (rule == "mup"), (rule, slopes)
