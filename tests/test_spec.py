"""All that is known of a weight is read off its arrow: shape, sharding, fan-in, role."""

from typing import Any

import pytest
from jax.sharding import PartitionSpec as P
from programs import block_specs, specs

from mutransformer.config.load import load
from mutransformer.sharding.spec import WIDTH_DIMS, Weight, weight

SIZES = {"M": 48, "H": 6, "K": 2, "D": 8, "F": 72, "V": 100}


def facts(w: Weight) -> tuple[Any, ...]:
    return w.shape, w.pspec, w.n_out, w.fan_in, w.role


@pytest.mark.parametrize(
    ("arrow", "shape", "pspec", "n_out", "fan_in", "role"),
    [
        ("V/x -> M/y", (100, 48), P("x", "y"), 1, 1, "input"),
        ("M/x -> V/y", (48, 100), P("x", "y"), 1, 48, "output"),
        ("M/x -> H/y D", (48, 6, 8), P("x", "y", None), 2, 48, "hidden"),
        ("M/x -> K/y D", (48, 2, 8), P("x", "y", None), 2, 48, "hidden"),
        ("M/x -> K D/y", (48, 2, 8), P("x", None, "y"), 2, 48, "hidden"),
        ("H/y D -> M/x", (6, 8, 48), P("y", None, "x"), 1, 48, "hidden"),
        ("M/x -> F/y", (48, 72), P("x", "y"), 1, 48, "hidden"),
        ("F/y -> M/x", (72, 48), P("y", "x"), 1, 72, "hidden"),
    ],
)
def test_an_arrow_tells_all_of_a_matrix(arrow, shape, pspec, n_out, fan_in, role):
    w = weight(arrow, SIZES)
    assert facts(w) == (shape, pspec, n_out, fan_in, role)
    assert w.is_matrix
    size = 1
    for n in shape:
        size *= n
    assert w.size == size


@pytest.mark.parametrize(("arrow", "shape", "n_out"), [("-> M/y", (48,), 1), ("-> H/y D", (6, 8), 2), ("->", (), 0)])
@pytest.mark.parametrize("role", ["gain", "bias"])
def test_a_vector_has_the_role_it_is_given(arrow, shape, n_out, role):
    w = weight(arrow, SIZES, role=role)
    assert (w.shape, w.n_out, w.fan_in, w.role, w.is_matrix) == (shape, n_out, 1, role, False)


@pytest.mark.parametrize("arrow", ["-> M/y", "->", "-> H/y D", "V -> D"])
def test_an_arrow_that_tells_no_role_is_refused(arrow):
    with pytest.raises(AssertionError, match="role cannot be inferred"):
        weight(arrow, SIZES)


def test_a_given_role_wins():
    assert weight("M -> D", SIZES).role == "output"
    assert weight("M -> D", SIZES, role="hidden").role == "hidden"


def test_an_unknown_dim_is_refused():
    with pytest.raises(KeyError, match="Q"):
        weight("M/x -> Q", SIZES)


def test_one_key_value_head_is_hidden():
    w = weight("M/x -> K/y D", {**SIZES, "K": 1})
    assert facts(w) == ((48, 1, 8), P("x", "y", None), 2, 48, "hidden")
    config = load(["model.d_model=48", "model.d_head=8", "model.n_kv_head=1", "mesh.y=2"])
    w = block_specs(config).w_k
    assert facts(w) == ((48, 1, 8), P("x", None, "y"), 2, 48, "hidden")


def test_dim_on():
    w = weight("H/y D -> M/x", SIZES)
    assert (w.dim_on("x"), w.dim_on("y")) == (2, 0)
    v = weight("-> D", SIZES, role="gain")
    assert (v.dim_on("x"), v.dim_on("y")) == (None, None)


def test_a_stack_is_the_same_weight_with_layers_in_front():
    one = weight("M/x -> H/y D", SIZES, init="zero")
    stack = one.stacked(3)
    assert facts(stack) == ((3, 48, 6, 8), P(None, "x", "y", None), 2, 48, "hidden")
    assert (stack.size, stack.init, stack.dim_on("x"), stack.dims[0].name) == (3 * one.size, "zero", 1, "L")


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("attention", {"b_q", "b_k", "b_v", "b_o"}),
        ("feed_forward", {"b_up", "b_gate", "b_down"}),
        ("layers", {"b_q", "b_k", "b_v", "b_o", "b_up", "b_gate", "b_down"}),
        ("all", {"b_q", "b_k", "b_v", "b_o", "b_up", "b_gate", "b_down", "b_unembed"}),
    ],
)
def test_biases_are_where_they_are_asked_for(where, names):
    def biases(*args):
        tree = specs(load(["model.activation=swiglu", "model.n_vocab=100", f"model.biases_in={where}", *args]))
        return {name for part in (tree, tree.blocks) for name, w in vars(part).items() if name.startswith("b_") and w is not None}

    assert biases("model.biases=true") == names and not biases()


def test_every_weight_of_a_model_with_all_of_them():
    config = load(
        [
            "model.d_model=48",
            "model.d_head=8",
            "model.n_kv_head=2",
            "model.n_layer=3",
            "model.ff_multiple=1.5",
            "model.activation=swiglu",
            "model.biases=true",
            "model.norm_scale=vector",
            "model.qk_norm=true",
            "model.embed_norm=true",
            "model.n_vocab=100",
            "model.vocab_multiple=64",
            "mesh.y=2",
        ]
    )
    tree = specs(config)
    blocks = {name: facts(w) for name, w in vars(tree.blocks).items()}
    q, kv, wide, row = (3, 48, 6, 8), (3, 48, 2, 8), (3, 48, 72), P(None, "y")
    assert blocks == {
        "w_q": (q, P(None, "x", "y", None), 2, 48, "hidden"),
        "w_k": (kv, P(None, "x", "y", None), 2, 48, "hidden"),
        "w_v": (kv, P(None, "x", "y", None), 2, 48, "hidden"),
        "w_o": ((3, 6, 8, 48), P(None, "y", None, "x"), 1, 48, "residual"),
        "w_up": (wide, P(None, "x", "y"), 1, 48, "hidden"),
        "w_gate": (wide, P(None, "x", "y"), 1, 48, "hidden"),
        "w_down": ((3, 72, 48), P(None, "y", "x"), 1, 72, "residual"),
        "attn_norm": ((3, 48), row, 1, 1, "gain"),
        "mlp_norm": ((3, 48), row, 1, 1, "gain"),
        "q_norm": ((3, 8), P(None, None), 1, 1, "qk_gain"),
        "k_norm": ((3, 8), P(None, None), 1, 1, "qk_gain"),
        "b_q": ((3, 6, 8), P(None, "y", None), 2, 1, "bias"),
        "b_k": ((3, 2, 8), P(None, "y", None), 2, 1, "bias"),
        "b_v": ((3, 2, 8), P(None, "y", None), 2, 1, "bias"),
        "b_o": ((3, 48), row, 1, 1, "bias"),
        "b_up": ((3, 72), row, 1, 1, "bias"),
        "b_gate": ((3, 72), row, 1, 1, "bias"),
        "b_down": ((3, 48), row, 1, 1, "bias"),
    }
    rest = {name: facts(w) for name, w in vars(tree).items() if name != "blocks"}
    assert rest == {
        "embed": ((128, 48), P("x", "y"), 1, 1, "input"),
        "unembed": ((48, 128), P("x", "y"), 1, 48, "output"),
        "embed_norm": ((48,), P("y"), 1, 1, "outer_gain"),
        "final_norm": ((48,), P("y"), 1, 1, "outer_gain"),
        "b_unembed": ((128,), P("y"), 1, 1, "outer_bias"),
    }


def test_width_dims_are_those_that_grow_with_d_model():
    def sizes(d_model: int) -> dict[str, int]:
        config = load([f"model.d_model={d_model}", "model.d_head=8", "model.n_vocab=100", "model.norm_scale=vector"])
        return {d.name: d.size for w in vars(specs(config)).values() if isinstance(w, Weight) for d in w.dims} | {
            d.name: d.size for w in vars(block_specs(config)).values() if w is not None for d in w.dims
        }

    narrow, wide = sizes(16), sizes(64)
    assert {name for name in narrow if wide[name] != narrow[name]} == WIDTH_DIMS
