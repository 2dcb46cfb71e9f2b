"""A coordinate check of any model: what it finds in the user's loss, and that it passes what is right and fails what is wrong."""

import csv
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
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
from mutransformer.mup.checks.intermediates import products
from mutransformer.mup.checks.verdict import CheckError

# The products of a loss. Each case is a loss of these weights and this input, or, by hand, what should be recorded of it.

N, D = 4, 6
CASES: list[Any] = []


def case(function: Any) -> Any:
    CASES.append(function)
    return function


def weights() -> dict[str, Array]:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"w": (D, D), "v": (D, D), "stack": (3, D, D), "table": (10, D), "kernel": (5, 1, 3), "bias": (D,), "scale": ()}
    return {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}


def total(y: Array) -> Array:
    return jnp.sum(jnp.sin(y))


def tokens_of(x: Array) -> Array:
    return (jnp.abs(x[:, 0]) * 3).astype(jnp.int32)


@case
def jit(p: Any, x: Array, by_hand: bool) -> Any:
    if by_hand:
        y = x @ p["w"]
        return {"w": y, "v": jnp.tanh(y) @ p["v"]}
    return total(eqx.filter_jit(lambda x: jax.jit(lambda y: jnp.tanh(y) @ p["v"])(x @ p["w"]))(x))


@case
def vmap(p: Any, x: Array, by_hand: bool) -> Any:
    return {"w": x @ p["w"].T} if by_hand else total(jax.vmap(lambda row: p["w"] @ row)(x))


@case
def custom_derivatives(p: Any, x: Array, by_hand: bool) -> Any:
    if by_hand:
        y = x @ p["w"]
        return {"w": y, "v": jnp.tanh(y) @ p["v"]}

    @jax.custom_vjp
    def first(a: Array, b: Array) -> Array:
        return a @ b

    first.defvjp(lambda a, b: (a @ b, (a, b)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    second = jax.custom_jvp(lambda a, b: a @ b)
    second.defjvps(lambda t, out, a, b: t @ b, lambda t, out, a, b: a @ t)
    return total(second(jnp.tanh(first(x, p["w"])), p["v"]))


@case
def checkpoint(p: Any, x: Array, by_hand: bool) -> Any:
    return {"w": x @ p["w"]} if by_hand else total(eqx.filter_checkpoint(jax.checkpoint(lambda x: x @ p["w"]))(x))


@case
def scan_over_stacked_layers(p: Any, x: Array, by_hand: bool) -> Any:
    if by_hand:
        seen = [x @ p["stack"][2]]
        seen += [jnp.tanh(seen[0]) @ p["stack"][1]]
        seen += [jnp.tanh(seen[1]) @ p["stack"][0]]
        return {"stack": jnp.stack(seen[::-1])}
    y, kept = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), y), x, p["stack"], reverse=True)
    return total(y) + total(kept)


@case
def loop_over_slices(p: Any, x: Array, by_hand: bool) -> Any:
    """The counter and a weight go through the carry, which leaves them weights."""
    if by_hand:
        firsts, seconds = [], [x]
        for i in range(3):
            firsts.append(seconds[-1] @ p["stack"][i])
            seconds.append(firsts[-1] @ p["w"])
        return {"stack": jnp.stack(firsts), "w": jnp.stack(seconds[1:])}
    return total(jax.lax.fori_loop(0, 3, lambda i, c: (c[0] @ p["stack"][i] @ c[1], c[1] + 0), (x, p["w"]))[0])


@case
def nested_scans_of_a_recurrence(p: Any, x: Array, by_hand: bool) -> Any:
    if by_hand:
        state, rows, seen = jnp.zeros(D), [], []
        for token in tokens_of(x):
            rows.append(p["table"][token])
            state = state + rows[-1]
            for i in range(3):
                seen.append(state @ p["stack"][i])
                state = jnp.tanh(seen[-1])
        return {"table": jnp.stack(rows)[:, None], "stack": jnp.stack(seen).reshape(N, 3, D)}

    def step(state: Array, token: Array) -> tuple[Array, Array]:
        inner, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), state + p["table"][token], p["stack"])
        return inner, inner

    return total(jax.lax.scan(step, jnp.zeros(D), tokens_of(x))[1])


@case
def branches_with_the_same_products(p: Any, x: Array, by_hand: bool) -> Any:
    y = x @ p["w"]
    if by_hand:
        return {"w": y, "v": y @ p["v"] if y.sum() > 0 else jnp.tanh(y) @ p["v"]}
    return total(jax.lax.cond(y.sum() > 0, lambda y: y @ p["v"], lambda y: jnp.tanh(y) @ p["v"], y))


@case
def branches_with_other_products_and_while_loops(p: Any, x: Array, by_hand: bool) -> Any:
    y = x @ p["w"]
    if by_hand:
        return {"w": y}
    z = jax.lax.cond(y.sum() > 0, lambda y: y @ p["v"], lambda y: 2 * y, y)
    return total(jax.lax.while_loop(lambda z: jnp.sum(z) < 100, lambda z: jnp.abs(z @ p["v"]) + 10, z))


@case
def convolution(p: Any, x: Array, by_hand: bool) -> Any:
    if by_hand:
        return {"kernel": jnp.stack([jnp.stack([jnp.correlate(row, k[0], mode="valid") for k in p["kernel"]]) for row in x])}
    return total(jax.lax.conv_general_dilated(x[:, None], p["kernel"], (1,), "VALID"))


@case
def lookups(p: Any, x: Array, by_hand: bool) -> Any:
    """By the batch. Rows that are the same for every batch are weights."""
    rows = p["table"][tokens_of(x)]
    y = (rows + p["table"][jnp.arange(N)]) @ p["stack"][1]
    return {"table": rows, "stack": y} if by_hand else total(y)


@case
def what_is_done_to_a_weight_alone(p: Any, x: Array, by_hand: bool) -> Any:
    normed = (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)).astype(jnp.bfloat16).astype(jnp.float32)
    y = x @ jax.lax.stop_gradient(normed[::-1].T * 2)
    z = y @ (p["v"] + p["stack"][0] @ p["stack"][1])
    return {"w": y, "stack & v": z} if by_hand else total(z)


@case
def what_scales_a_product(p: Any, x: Array, by_hand: bool) -> Any:
    """And nothing else: not what is done in one of two uses, nor a vector."""
    y = (x @ p["w"] + p["bias"][None]).T / 4 * p["scale"]
    z = y.T @ p["v"]
    u = jax.nn.gelu(z) @ p["stack"][0]
    if by_hand:
        return {"w": (x @ p["w"]) / 4 * p["scale"], "v": z, "stack": u}
    return total(u * p["bias"][None] * 0.5)


@case
def two_activations_and_a_weight_twice(p: Any, x: Array, by_hand: bool) -> Any:
    q, k = x @ p["w"], jnp.tanh(x) @ p["w"]
    logits = q @ k.T / 3
    y = jax.nn.softmax(logits) @ k
    return {"w": q, "w (2)": k, "product 1": logits, "product 2": y} if by_hand else total(y)


@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_products_of_a_loss(function: Any) -> None:
    model, x = weights(), jax.random.normal(jax.random.key(9), (N, D))
    loss, expected = partial(function, by_hand=False), function(model, x, by_hand=True)
    value, listed = jax.jit(partial(products, loss))(model, x)
    assert value == pytest.approx(float(jax.jit(loss)(model, x)), rel=1e-6)  # with JAX 0.12 one differs in its last digit
    found = {each.name: each for each in listed}
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].weights == (() if "product" in name else tuple(name.split(" (")[0].split(" & ")))
        assert sorted(found[name].array.shape) == sorted(array.shape), name
        a, b = (jnp.sort(jnp.abs(each), axis=None) for each in (found[name].array, array))  # products may be transposed
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5), name


def test_leaves_that_are_no_weights_are_kept() -> None:
    class Model(eqx.Module):
        w: Array
        order: Array
        key: Array
        nothing: None
        activation: Callable[[Array], Array]
        times: int = eqx.field(static=True)

    model = Model(jnp.eye(3), jnp.array([2, 0, 1]), jax.random.key(0), None, jnp.tanh, 2)

    def loss(model: Model, batch: dict[str, Any]) -> Array:
        kept = jax.random.bernoulli(batch["key"], shape=(2, 3)) | (batch["mode"] == "all")
        assert model.nothing is None
        return jnp.sum(model.activation(batch["x"] @ model.w[model.order] * model.times) * kept)

    batch = {"x": np.arange(6.0, dtype=np.float32).reshape(2, 3), "key": jax.random.key(1), "mode": "all"}
    value, found = products(loss, model, batch)
    assert value == loss(model, batch) and [each.name for each in found] == ["w"]
    assert np.array_equal(found[0].array, 2 * batch["x"][:, [1, 2, 0]])


# Checks of models


def mlp(width: int, key: Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(20, 16, width, 2, key=key)


def squares(model: Any, batch: tuple[Array, Array]) -> Array:
    return jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)


def points(seed: int) -> tuple[Array, Array]:
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, (32, 20)), jax.random.normal(b, (32, 16))


def check(batch: Any = points, **settings: Any) -> mup.CoordinateReport:
    return mup.coord_check(mlp, squares, batch, [64, 256], base={"width": 64}, steps=3, **settings)


@pytest.fixture(scope="module")
def report() -> mup.CoordinateReport:
    return check()


def test_an_mlp_passes_and_its_control_grows(report: mup.CoordinateReport, tmp_path: Path) -> None:
    on_rule, on_control = report.verdicts
    assert report.passed and (on_rule.outcome, on_control.outcome) == ("PASS", "PASS"), report
    assert "mup: 33 slopes over widths 64 to 256 are as expected" in on_rule.text
    assert "the control sp grows, as it should" in on_control.text
    matrices, biases = ([f"layers.{i}.{name}" for i in range(3)] for name in ("weight", "bias"))
    assert report.expected.start == {"layers.2.weight": -0.5} and not report.expected.readouts
    assert report.expected.update == {matrices[0]: 0, matrices[1]: -1, matrices[2]: -1, **dict.fromkeys(biases, 0)}
    seen = {(c.variant, c.at, c.seed, c.kind, c.name, c.step) for c in report.coordinates}
    kinds = [("size", matrices, range(4)), ("change", matrices, range(1, 4)), ("update", matrices + biases, range(1, 4))]
    names = [(kind, name, step) for kind, of, steps in kinds for name in of for step in steps]
    assert seen == {(v, a, s, *name) for v in ("mup", "sp") for a in (64, 256) for s in range(3) for name in names}
    assert len(report.coordinates) == len(seen)
    lines = str(report).splitlines()
    assert lines[:3] == [str(on_rule), str(on_control), ""]
    assert lines[3].split("  ")[0] == "slope over width" and lines[3].endswith("step 3")
    assert len(lines) == 4 + 2 * (3 + 3 + 6)
    (tmp_path / "numbers.csv").write_text(report.csv())
    with (tmp_path / "numbers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == pytest.approx([c.value for c in report.coordinates], rel=1e-5)
    assert {row["name"] for row in rows} == {*matrices, *biases}


def test_what_is_measured_is_what_training_by_hand_gives(report: mup.CoordinateReport) -> None:
    roles = mup.infer(mlp_without_key, {"width": 64}, {"width": 256}).at(width=256)
    model = start = mup.init(mlp(256, jax.random.key(1)), roles)
    tx, data = mup.optimizer(roles, optax.adam, 2**-10), points(1)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        updates, state = tx.update(eqx.filter_grad(squares)(model, data), state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    def hidden(model: Any) -> Array:
        return jax.nn.relu(data[0] @ model.layers[0].weight.T + model.layers[0].bias[None]) @ model.layers[1].weight.T

    moved, state = step(model, state)
    model, _ = step(moved, state)
    expected = {
        "size": hidden(model),
        "change": hidden(model) - hidden(start),
        "update": model.layers[1].weight - moved.layers[1].weight,
    }
    at = {(c.variant, c.at, c.seed, c.kind, c.name, c.step): c.value for c in report.coordinates}
    for kind, array in expected.items():
        found = at["mup", 256, 1, kind, "layers.1.weight", 2]
        assert found == pytest.approx(float(jnp.mean(jnp.abs(array))), rel=1e-3), kind


def mlp_without_key(width: int) -> eqx.nn.MLP:
    return mlp(width, jax.random.key(0))


def test_an_output_declared_hidden_fails() -> None:
    wrong = check(override={"layers.2.weight": "hidden"})
    assert not wrong.passed and wrong.verdicts[0].outcome == "FAIL"
    assert "size of layers.2.weight before training" in wrong.verdicts[0].text


def language_model(width: int, key: Array) -> dict[str, Any]:
    a, b, c = jax.random.split(key, 3)
    hidden, head = eqx.nn.Linear(width, width, key=b), eqx.nn.Linear(width, 30, key=c)
    return {"embedding": eqx.nn.Embedding(30, width, key=a), "hidden": hidden, "head": head}


def next_token(model: dict[str, Any], tokens: Array) -> Array:
    logits = jax.vmap(lambda t: model["head"](jax.nn.relu(model["hidden"](model["embedding"](t)))))(tokens[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()


def text(seed: int) -> Array:
    return jax.random.randint(jax.random.key(seed), (33,), 0, 30)


@pytest.mark.slow
def test_an_embedding_declared_hidden_fails() -> None:
    told = partial(mup.coord_check, language_model, next_token, text, [64, 256], base={"width": 64}, steps=2, seeds=2)
    assert told().passed
    wrong = told(override={"embedding.weight": "hidden"})
    assert wrong.verdicts[0].outcome == "FAIL" and "change of embedding.weight" in wrong.verdicts[0].text


def test_sp_itself_fails_and_has_no_control() -> None:
    on_rule, no_control = check(rule="sp", seeds=[4, 2], batch=points(0)).verdicts
    assert (on_rule.outcome, no_control.outcome) == ("FAIL", "WARNING")


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, key: Array):
        a, b, c = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(width // 16, width, key=a)
        self.norm = eqx.nn.LayerNorm(width)
        self.up, self.down = eqx.nn.Linear(width, 2 * width, key=b), eqx.nn.Linear(2 * width, width, key=c)

    def __call__(self, x: Array) -> Array:
        normed = jax.vmap(self.norm)(x)
        x = x + self.attention(normed, normed, normed, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(lambda row: self.down(jax.nn.gelu(self.up(self.norm(row)))))(x)


class Scanned(eqx.Module):
    """A Transformer whose layers are one stack of arrays."""

    embedding: eqx.nn.Embedding
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self, width: int, n_layer: int = 2, *, key: Array):
        a, b, c = jax.random.split(key, 3)
        self.embedding, self.head = eqx.nn.Embedding(30, width, key=a), eqx.nn.Linear(width, 30, key=c)
        self.blocks = eqx.filter_vmap(lambda key: Block(width, key))(jax.random.split(b, n_layer))

    def __call__(self, tokens: Array) -> Array:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        layer = jax.checkpoint(lambda x, arrays: (eqx.combine(arrays, static)(x), None))
        x, _ = jax.lax.scan(layer, jax.vmap(self.embedding)(tokens), arrays)
        return jax.vmap(self.head)(x)


def scanned_loss(model: Scanned, tokens: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(tokens[:, :-1]), tokens[:, 1:]).mean()


def texts(seed: int) -> Array:
    return jax.random.randint(jax.random.key(seed), (4, 9), 0, 30)


def test_names_of_a_transformer_with_a_scan_over_layers() -> None:
    model = eqx.filter_eval_shape(Scanned, 64, key=jax.random.key(0))
    _, listed = eqx.filter_eval_shape(products, scanned_loss, model, texts(0))
    found = {each.name: each for each in listed}
    projections = [f"blocks.attention.{name}_proj.weight" for name in ("query", "key", "value", "output")]
    inner = [*projections[:3], "product 1", "product 2", projections[3], "blocks.up.weight", "blocks.down.weight"]
    assert [*found] == ["embedding.weight", *inner, "head.weight"]
    assert {found[name].array.shape[0] for name in inner} == {2}  # the layers
    sizes = {name: found[name].array.size for name in ("product 1", "blocks.up.weight", "head.weight")}
    assert sizes == {"product 1": 2 * 4 * 4 * 8 * 8, "blocks.up.weight": 2 * 4 * 8 * 128, "head.weight": 4 * 8 * 30}


@pytest.mark.slow
def test_a_transformer_with_a_scan_over_layers_passes() -> None:
    depth = ({"n_layer": 2}, {"n_layer": 3})
    told = mup.coord_check(Scanned, scanned_loss, texts, [64, 128, 256], base={"width": 64, "n_layer": 2}, depth=depth)
    assert told.passed, told


# Mistakes


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "one width": ({"widths": [64, 64]}, r"widths \[64, 64\]: at least two different ones are needed"),
    "below the base": ({"widths": [32, 64]}, "widths: 32 is below that of the base, width=64"),
    "one step": ({"steps": 1}, "steps 1: must be at least 2"),
    "a seed twice": ({"seeds": [1, 1]}, r"seeds \[1, 1\]: must be different, and one at least"),
    "no seed": ({"seeds": 0}, r"seeds \[\]: must be different, and one at least"),
    "sgd": ({"optimizer": optax.sgd}, "optimizer: must be optax.adam or one of its relatives, .*"),
    "a relative of sgd": ({"optimizer": optax.noisy_sgd, "settings": {"family": "sgd"}}, "optimizer: must be optax.adam .*"),
    "not a scalar": ({"loss": lambda model, batch: batch[0] @ model.layers[0].weight.T}, r"loss: must return a scalar, not .*"),
    "two results": ({"loss": lambda model, batch: (squares(model, batch), 0)}, r"loss: must return a scalar, not .*"),
    "no product": ({"loss": lambda model, batch: jnp.sum(model.layers[0].weight ** 2)}, "loss: computes no product of .*"),
    "another batch": ({"loss": lambda model, batch: squares(model, points(0))}, "loss: computes no product of .*"),
    "batches that differ": (
        {"batch": lambda seed: (jnp.zeros((seed + 1, 20)), jnp.zeros((seed + 1, 16)))},
        "batch: must have the same arrays, of the same shapes, for every seed",
    ),
    "other products at another width": (
        {"loss": lambda model, batch: sum(jnp.sum(batch[0] @ model.layers[0].weight.T) for _ in model.layers[0].bias[::64])},
        r"loss: layers.0.weight \(2\), .*: computed at one of the widths 64 and 256 only",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, message = MISTAKES[name]
    monkeypatch.setattr("mutransformer.mup.checks.coordinates._train", lambda *_: pytest.fail("trained"))
    arguments = {"loss": squares, "batch": points, "widths": [64, 256], **given}
    with pytest.raises(CheckError, match=f"^{message}$"):
        mup.coord_check(mlp, base={"width": 64}, **arguments)


def test_the_example_of_the_docs_runs_and_prints_its_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    for heading, code in blocks(ROOT / "docs/mup.md", "python"):
        if heading in ("Your own model", "Check it"):
            capsys.readouterr()
            exec(code, scope)
    (printed,) = [text for heading, text in blocks(ROOT / "docs/mup.md", "text") if heading == "Check it"]
    line = re.compile(r"^(.*)(?:; the furthest: .*|: layers.2.weight changes (.*) times .*)$", re.MULTILINE)
    found, told = line.findall(capsys.readouterr().out), line.findall(printed)
    assert scope["report"].passed and [words for words, _ in found] == [words for words, _ in told]
    assert float(found[1][1]) == pytest.approx(float(told[1][1]), rel=0.1)
