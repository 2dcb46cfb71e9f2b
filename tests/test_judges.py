"""Judges from elsewhere of `mup.infer`, `mup.init` and `mup.optimizer`: numbers of microsoft/mup, tolerances of two test suites.

results/judges/microsoft_mup.json holds what microsoft/mup gives for two models; here are the same two in Equinox. It multiplies
the input of the last layer by c = base width / width in the forward pass, where ours scales the weight itself. The weight that
acts is c times theirs. So its initial values are c times theirs; its learning rate is c times theirs under Adam, whose updates do
not depend on the gradient's scale, and c^2 times theirs under SGD, as the gradient of theirs is c times that of the one that acts
(Yang et al., arXiv 2203.03466, Tables 3 and 8). For the same reason their eps acts as eps / c. Weight decay removes a share of a
weight, whatever c is.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from short_runs import ROOT

from mutransformer import mup

JUDGE = json.loads((ROOT / "results/judges/microsoft_mup.json").read_text())
SIZES = (64, 128, 256, 512)
OPTIMIZERS: dict[str, tuple[Any, float]] = {"adam": (optax.adam, 2**-7), "sgd": (optax.sgd, 0.1)}
KEY = jax.random.key(0)


def linear(n_in: int, n_out: int, bias: bool = True) -> eqx.nn.Linear:
    return eqx.nn.Linear(n_in, n_out, use_bias=bias, key=KEY)


class Perceptron(eqx.Module):
    inner: eqx.nn.Linear
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width: int, n_in: int = 20):
        self.inner, self.hidden, self.head = linear(n_in, width), linear(width, width), linear(width, 10)

    def __call__(self, x: Array) -> dict[str, Array]:
        inner = self.inner(x)
        hidden = self.hidden(jax.nn.relu(inner))
        return {"inner": inner, "hidden": hidden, "head": self.head(jax.nn.relu(hidden))}


class Attention(eqx.Module):
    embedding: eqx.nn.Embedding
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width: int):
        self.embedding = eqx.nn.Embedding(30, width, key=KEY)
        self.query, self.key, self.value, self.output = (linear(width, width, bias=False) for _ in range(4))
        self.head = linear(width, 10)

    def __call__(self, tokens: Array) -> dict[str, Array]:
        x = jax.vmap(self.embedding)(tokens)
        q, k, v = (jax.vmap(layer)(x) for layer in (self.query, self.key, self.value))
        heads = [w.reshape(len(tokens), -1, 16) for w in (q, k, v)]
        logits = jnp.einsum("qhd,khd->hqk", *heads[:2]) / 16
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits), heads[2]).reshape(x.shape)
        output = jax.vmap(self.output)(mixed)
        sizes = {"embedding": x, "query": q, "key": k, "value": v, "attention": logits, "output": output}
        return {**sizes, "head": jax.vmap(self.head)(x + output)}


class Uneven(eqx.Module):
    """Two widths, which grow by different factors."""

    inner: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width: int, wide: int):
        self.inner, self.up, self.down, self.head = linear(20, width), linear(width, wide), linear(wide, width), linear(width, 10)


MODELS: dict[str, Any] = {"mlp": Perceptron, "attention": Attention}


@cache
def roles_of(name: str, width: int) -> mup.Roles:
    return mup.infer(MODELS[name], base={"width": 64}, other={"width": 96}).at(width=width)


def theirs(name: str, width: int, number: str) -> dict[str, float]:
    """By weight: `init`, `adam` or `sgd` of microsoft/mup, for the weight that acts."""
    power = {"init": 1, "adam": 1, "sgd": 2}[number]
    rows = JUDGE["factors"][name][str(width)]
    return {w: row["rescale" if number == "init" else number] * row["forward"] ** power for w, row in rows.items()}


def ours(roles: mup.Roles, number: str, rule: str = "mup") -> dict[str, float]:
    factors = roles.factors(rule, sgd=number == "sgd")
    return {w: each.init if number == "init" else each.lr for w, each in factors.items()}


@pytest.mark.parametrize("number", ["init", "adam", "sgd"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_are_those_of_microsoft_mup(name: str, number: str) -> None:
    """On initial values and on learning rates, at five widths, to the digits of the file. Controls: `sp`, a wrong role."""
    wrong = mup.infer(MODELS[name], base={"width": 64}, other={"width": 96}, override={"head.weight": "input"})
    for width in JUDGE["settings"]["widths"]:
        expected = pytest.approx(theirs(name, width, number), rel=1e-6)
        assert ours(roles_of(name, width), number) == expected
        assert (ours(roles_of(name, width), number, "sp") == expected) == (width == 64)
        assert (ours(wrong.at(width=width), number) == expected) == (width == 64)


@pytest.mark.parametrize("name", MODELS)
def test_factors_on_what_initializers_draw_are_those_of_microsoft_mup(name: str) -> None:
    """mup.init.kaiming_normal_ and, for a std that is the same at every width, mup.init.normal_: here constant_init."""
    paths = {path for path, row in JUDGE["factors"][name]["64"].items() if "normal" in row}
    constant = mup.infer(MODELS[name], base={"width": 64}, other={"width": 96}, constant_init=paths)
    for width in JUDGE["settings"]["widths"]:
        rows = JUDGE["factors"][name][str(width)]
        by_fan_in, by_constant = ours(roles_of(name, width), "init"), ours(constant.at(width=width), "init")
        for path in paths:
            assert by_fan_in[path] == pytest.approx(rows[path]["kaiming"] * rows[path]["forward"], rel=1e-6), path
            assert by_constant[path] == pytest.approx(rows[path]["normal"] * rows[path]["forward"], rel=1e-6), path
        assert (by_fan_in == by_constant) == (width == 64)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_removes_the_share_of_microsoft_mup(kind: str) -> None:
    """Of matrices; of biases only with decay_vectors, theirs of all."""
    roles, model = roles_of("mlp", 256), eqx.filter(Perceptron(256), eqx.is_inexact_array)
    for vectors in (True, False):
        make: Any = {"adamw": optax.adamw, "sgd": optax.sgd}[kind]
        tx = mup.optimizer(roles, make, 0.5, weight_decay=0.25, decay_vectors=vectors)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, model), tx.init(model), model)
        for w, row in JUDGE["factors"]["mlp"]["256"].items():
            layer, kind_of_weight = w.split(".")
            before, change = (getattr(getattr(tree, layer), kind_of_weight) for tree in (model, updates))
            share = row[f"{kind}_decay"] if vectors or kind_of_weight == "weight" else 0.0
            assert jnp.allclose(change, -0.5 * 0.25 * share * before, rtol=1e-6), w


def uneven(number: str) -> tuple[dict[str, float], dict[str, float]]:
    roles = mup.infer(Uneven, base={"width": 64, "wide": 128}, other={"width": 96, "wide": 160}).at(width=256, wide=2048)
    power = {"adam": 1, "sgd": 2}[number]
    return ours(roles, number), {w: row[number] * row["forward"] ** power for w, row in JUDGE["uneven"].items()}


def test_rates_of_two_widths_that_grow_unevenly_are_theirs() -> None:
    found, expected = uneven("adam")
    assert found == pytest.approx(expected, rel=1e-6)


def test_rates_of_sgd_of_two_widths_that_grow_unevenly_are_theirs() -> None:
    found, expected = uneven("sgd")
    assert found == pytest.approx(expected, rel=1e-6)


def batch_of(name: str) -> tuple[Array, Array]:
    draw = np.random.RandomState(1000)
    if name == "mlp":
        return jnp.asarray(draw.standard_normal((64, 20)), jnp.float32), jnp.asarray(draw.randint(10, size=64))
    return jnp.asarray(draw.randint(30, size=(16, 16))), jnp.asarray(draw.randint(10, size=(16, 16)))


def filled(make: Callable[[], Any], draw: Callable[[tuple[int, ...], float], np.ndarray]) -> Any:
    """A model with initial values draw(shape, std), in the order of sorted names; gains are 1.

    The std is 1 for the embedding, otherwise fan-in^-1/2 of the layer.
    """
    model = eqx.filter_eval_shape(make)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
    }
    values = {}
    for path in sorted(shapes):
        layer = path.rpartition(".")[0]
        matrix = shapes[f"{layer}.weight"]
        std = 1.0 if layer == "embedding" else matrix[-1] ** -0.5
        values[path] = jnp.asarray(draw(shapes[path], std) if len(matrix) > 1 else np.ones(matrix), jnp.float32)
    return jax.tree.unflatten(jax.tree.structure(model), [values[path] for path in shapes])


def as_in_the_file(name: str, width: int, seed: int) -> Any:
    draw = np.random.RandomState(seed)
    return filled(lambda: MODELS[name](width), lambda shape, std: draw.standard_normal(shape) * std)


def as_by_default(name: str, width: int, seed: int) -> Any:
    """Distributed as Equinox and torch do: normal embeddings, the rest uniform within fan-in^-1/2."""
    draw = np.random.RandomState(1000 * seed + width)
    own = lambda shape, std: draw.standard_normal(shape) if std == 1 else draw.uniform(-std, std, shape)  # noqa: E731
    return filled(lambda: MODELS[name](width), own)


def sizes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.mean(jnp.abs(x)), tree)


def train(models: list[Any], tx: Any, batches: Any) -> tuple[Any, Any, Any]:
    """Trains models, each on the same batches, which are stacked by step.

    Returns, by model and step, mean absolute values: of the layers' outputs before the step, of the weights before it, of their
    changes by it.
    """

    def loss(model: Any, x: Array, y: Array) -> tuple[Array, dict[str, Array]]:
        out = jax.vmap(model)(x)
        return optax.softmax_cross_entropy_with_integer_labels(out["head"], y).mean(), out

    def step(carry: Any, batch: Any) -> Any:
        model, state = carry
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(model, *batch)
        updates, state = tx.update(grads, state, model)
        return (optax.apply_updates(model, updates), state), (sizes(out), sizes(model), sizes(updates))

    @jax.jit
    def run(models: Any) -> Any:
        return jax.vmap(lambda model: jax.lax.scan(step, (model, tx.init(model)), batches)[1])(models)

    return run(jax.tree.map(lambda *leaves: jnp.stack(leaves), *models))


SEEDS = 6  # the first two from the file


@cache
def coordinates(name: str, kind: str, rule: str, width: int) -> dict[str, np.ndarray]:
    """By layer: of each seed at step 0 to 3."""
    roles, (make, lr) = roles_of(name, width), OPTIMIZERS[kind]
    models = [(as_in_the_file if seed < 2 else as_by_default)(name, width, seed) for seed in range(SEEDS)]
    batches = jax.tree.map(lambda x: jnp.stack([x] * 4), batch_of(name))
    outputs = train([mup.init(model, roles, rule) for model in models], mup.optimizer(roles, make, lr, rule), batches)[0]
    return {layer: np.asarray(values) for layer, values in outputs.items()}


@pytest.mark.parametrize(
    ("name", "kind", "widths"),
    [
        ("mlp", "adam", SIZES[-1:]),
        ("mlp", "sgd", SIZES[-1:]),
        ("attention", "adam", SIZES[-1:]),
        *(
            pytest.param(*each, SIZES, marks=pytest.mark.slow)
            for each in (("mlp", "adam"), ("attention", "adam"), ("attention", "sgd"))
        ),
    ],
)
def test_three_steps_from_the_same_values_are_those_of_microsoft_mup(name: str, kind: str, widths: tuple[int, ...]) -> None:
    """Every coordinate of two seeds, from the same initial values and data, also of `sp`. Largest error found: 2e-5.

    Control: away from the base width, numbers of the other parametrization are far from them.
    """
    for width in widths:
        for rule, other in (("mup", "sp"), ("sp", "mup")):
            found, error = coordinates(name, kind, rule, width), {}
            for which in (rule, other):
                expected = JUDGE["shared_draws"][name][f"{kind} {which}"][str(width)]
                assert found.keys() == expected["0"].keys()
                ratios = [found[layer][seed] / expected[str(seed)][layer] for layer in found for seed in (0, 1)]
                error[which] = np.max(np.abs(np.log(ratios)))
            assert error[rule] < 2e-4, (width, rule, error)
            assert error[other] > 0.1 or width == 64, (width, rule, error)


@pytest.mark.parametrize("name", ["mlp", pytest.param("attention", marks=pytest.mark.slow)])
def test_slopes_from_values_of_ones_own_are_those_of_microsoft_mup(name: str) -> None:
    """Of every coordinate over widths 64 to 512 and at every step, within four standard errors of the difference.

    They follow from the spread over seeds, here and there. Control: `sp` is more than 20 off.
    """
    largest = {}
    for rule in ("mup", "sp"):
        found = {width: coordinates(name, "adam", rule, width) for width in SIZES}
        for layer, steps in JUDGE["independent"][name]["mup"].items():
            logs = np.log([found[width][layer][2:] for width in SIZES])  # width, seed, step
            slopes = np.polyfit(np.log(SIZES), logs.reshape(len(SIZES), -1), 1)[0].reshape(logs.shape[1:])
            for ours, step in zip(slopes.T, steps, strict=True):
                sd = max(step["to_512"]["sd"], float(np.std(ours, ddof=1)))
                error = sd * (1 / len(ours) + 1 / 10) ** 0.5
                off = abs(np.mean(ours) - step["to_512"]["slope"]) / error
                largest[rule] = max(largest.get(rule, 0.0), off)
    assert largest["mup"] < 4 and largest["sp"] > 20, largest


def blobs(n_steps: int) -> tuple[Array, Array]:
    """Batches of 64 points of 64 features around ten means."""
    draw = np.random.RandomState(0)
    means, labels = draw.standard_normal((10, 64)), draw.randint(10, size=(n_steps, 64))
    return jnp.asarray(means[labels] + draw.standard_normal((n_steps, 64, 64)), jnp.float32), jnp.asarray(labels)


def slopes_that_are_off(kind: str, rule: str, atol: float) -> set[str]:
    """Names, with the step, of the coordinates, weights and changes whose slope over width is not what muP says."""
    widths, found = (64, 256, 1024), []
    for width in widths:
        roles = mup.infer(partial(Perceptron, n_in=64), base={"width": 64}, other={"width": 96}).at(width=width)
        make, lr = {"adam": (optax.adam, 0.01), "sgd": (optax.sgd, 0.1)}[kind]
        models = []
        for seed in range(3):
            draw = np.random.RandomState(1000 * seed + width)
            model = filled(
                lambda width=width: Perceptron(width, 64), lambda shape, std, draw=draw: draw.standard_normal(shape) * std
            )
            zero = lambda m: [m.inner.bias, m.hidden.bias, m.head.bias, m.head.weight]  # noqa: E731
            model = eqx.tree_at(zero, model, replace_fn=jnp.zeros_like)
            models.append(mup.init(model, roles, rule))
        found.append(jax.tree.map(lambda x: np.mean(x, axis=0), train(models, mup.optimizer(roles, make, lr, rule), blobs(3))))
    expected = {"weight": {"inner": (0, 0), "hidden": (-0.5, -1), "head": (-1, -1)}}
    off = set()
    for layer in ("inner", "hidden", "head"):
        series = {f"{layer} output": ([out[layer] for out, _, _ in found], 0.0)}
        for what in ("weight", "bias"):
            w, dw = expected.get(what, {}).get(layer, (0, 0))
            series[f"{layer} {what}"] = ([getattr(getattr(each[1], layer), what) for each in found], w)
            series[f"{layer} {what} change"] = ([getattr(getattr(each[2], layer), what) for each in found], dw)
        for name, (values, slope) in series.items():
            for t, y in enumerate(np.array(values).T):
                if y.any() and not abs(np.polyfit(np.log(widths), np.log(y), 1)[0] - slope) <= atol:
                    off.add(f"{name} {t}")
    return off


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_slopes_within_the_tolerance_of_cellarium_ml(kind: str) -> None:
    """cellarium-ml, tests/test_mup.py: log-log slopes over width, at each of three steps, +-0.1.

    Of outputs 0; of weights 0, -1/2, -1 (input, hidden, output), of their changes 0, -1, -1; of biases and their changes 0. `sp`
    must fail even with +-0.2. Here as there the last layer and the biases start at zero, and the learning rate is 0.01 for Adam,
    0.1 for SGD. Shrunk: widths 64, 256, 1024 (seven from 128 to 8192), three seeds (five), ReLU with biases alone (tanh and no
    biases too), 64 features around ten means (CIFAR-10), no constant multipliers. Left out: AdamW.
    """
    assert not slopes_that_are_off(kind, "mup", 0.1)
    assert {"head output 1", "head output 2"} <= slopes_that_are_off(kind, "sp", 0.2)


class Block(eqx.Module):
    """Attention with two heads, whose size grows, and a gated feed-forward layer; both are normalized before they are added."""

    layers: dict[str, eqx.nn.Linear]
    norms: dict[str, eqx.nn.RMSNorm]

    def __init__(self, width: int):
        names = ("query", "key", "value", "output", "gate", "up", "down")
        self.layers = {name: linear(width, width, bias=False) for name in names}
        self.norms = {name: norm(width) for name in ("query", "key", "attention", "feed_forward")}

    def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
        n, width = x.shape
        layers, norms = ({name: jax.vmap(f) for name, f in each.items()} for each in (self.layers, self.norms))
        q, k, v = (layers[name](x) for name in ("query", "key", "value"))
        heads = [w.reshape(n, 2, -1) for w in (norms["query"](q), norms["key"](k), v)]
        logits = jnp.einsum("qhd,khd->hqk", *heads[:2]) * 8 / width  # 16^-1/2 for the base model's heads of 16
        causal = jnp.where(jnp.tril(jnp.ones((n, n), bool))[None], logits, -jnp.inf)
        output = layers["output"](jnp.einsum("hqk,khd->qhd", jax.nn.softmax(causal), heads[2]).reshape(n, width))
        x = x + norms["attention"](output)
        gate, up = layers["gate"](x), layers["up"](x)
        down = layers["down"](jax.nn.silu(gate) * up)
        after = x + norms["feed_forward"](down)
        found = {"query": q, "key": k, "value": v, "output": output, "gate": gate, "up": up, "down": down, "block": after}
        return after, found


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, width: int):
        self.embedding, self.head = eqx.nn.Embedding(N_VOCAB, width, key=KEY), linear(width, N_VOCAB, bias=False)
        self.blocks, self.norm = [Block(width) for _ in range(2)], norm(width)

    def __call__(self, tokens: Array) -> dict[str, Array]:
        x = jax.vmap(self.embedding)(tokens)
        found = {"embedding": x}
        for i, block in enumerate(self.blocks):
            x, inner = block(x)
            found |= {f"{i}.{name}": value for name, value in inner.items()}
        return {**found, "head": jax.vmap(self.head)(jax.vmap(self.norm)(x))}


def norm(width: int) -> eqx.nn.RMSNorm:
    return eqx.nn.RMSNorm(width, eps=1e-6, use_bias=False)


N_STEPS, N_SEEDS, N_VOCAB = 50, 10, 114


def coordinates_after_training(width: int, rule: str) -> dict[str, float]:
    """By module, mean over seeds, after 50 steps on windows of a counting sequence; each token is its own target."""
    roles = mup.infer(Transformer, base={"width": 32}, other={"width": 48}).at(width=width)
    models = []
    for seed in range(N_SEEDS):
        draw = np.random.RandomState(1000 * seed + width)
        narrow = lambda shape, std, draw=draw: draw.normal(0, 0.02 * (1 if std == 1 else 32**0.5 * std), shape)  # noqa: E731
        models.append(mup.init(filled(lambda: Transformer(width), narrow), roles, rule))
    first = jnp.arange(64).reshape(1, 2, 32)
    tokens = first + jnp.asarray([*range(N_STEPS), 0])[:, None, None]
    tx = mup.optimizer(roles, optax.adamw, 0.01, rule, weight_decay=0.1, b1=0.9, b2=0.95)
    outputs = train(models, tx, (tokens, tokens))[0]
    return {name: float(jnp.mean(values[:, -1])) for name, values in outputs.items()}


@pytest.mark.slow
def test_coordinates_within_the_tolerance_of_olmo_core() -> None:
    """OLMo-core, src/test/nn/mup_test.py: the mean absolute output of every module after training, d_model 8, 16, 64, 128 to 32.

    From the narrower to the wider of two models it grows at most 2 times, and falls to no less than 0.3. As there: two layers,
    two heads, norms of branches, queries and keys, std 0.02 at the base width, 10 seeds, 50 steps, learning rate 0.01, weight
    decay 0.1, betas 0.9 and 0.95, the data. Shrunk: a feed-forward layer as wide as the model (about three times there), no
    rotary embedding, outputs of norms left out. The embedding decays too (not there). Control: `sp`, whose worst is over 10.
    """
    worst = {}
    for rule in ("mup", "sp"):
        found = {width: coordinates_after_training(width, rule) for width in (8, 16, 32, 64, 128)}
        ratios = [(found[w][name] / base) ** (1 if w > 32 else -1) for w in found for name, base in found[32].items()]
        worst[rule] = min(ratios), max(ratios)
    assert worst["mup"][0] >= 0.3 and worst["mup"][1] <= 2, worst
    assert worst["sp"][1] > 10, worst
