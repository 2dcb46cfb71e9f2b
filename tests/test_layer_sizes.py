"""The sizes of layers (log.layers): right on any mesh and for every optimizer, and without a trace in what is trained."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_unless
from jax.sharding import PartitionSpec
from programs import program
from test_sharding import MODELS, TINY, bits, params

from mutransformer.config.load import load
from mutransformer.data.batches.rows import Batch
from mutransformer.model.ops import shift_right
from mutransformer.sharding.mesh import put_batch
from mutransformer.training import layer_sizes
from mutransformer.training.layer_sizes import OF_WEIGHTS, QUANTITIES, LayerSizes, Layout, activation_sizes, named
from mutransformer.training.program import Program, TrainState
from mutransformer.training.step import make_loss_and_grads, make_train_step

REAL = 250  # ids of the padded 256
DECAY = ["optim.warmup_steps=0", "optim.weight_decay=0.1", "optim.clip_norm=0.5"]  # so small that it clips
OPTIMIZERS = {
    "adamw": [],
    "adamw, coupled": ["optim.decay=coupled", "optim.rule=completed_p", "optim.decay_vectors=true"],
    "lion": ["optim.name=lion", "optim.decay=coupled"],
    "muon": ["optim.name=muon"],
}


def built(*settings: str, mesh: tuple[int, int, int] = (1, 1, 1)) -> Program:
    x, y, z = mesh
    on = [f"mesh.x={x}", f"mesh.y={y}", f"mesh.replicas={z}"]
    return program(load([*TINY, "data.batch_size=16", *DECAY, *settings, *on]), jax.devices()[: x * y * z], bos_id=1)


def batch_of(p: Program, seed: int = 0) -> Batch:
    rng, shape = np.random.default_rng(seed), (p.config.data.batch_size, p.config.data.seq_len)
    ids, mask = rng.integers(0, REAL, shape, dtype=np.int32), rng.random(shape) < 0.8
    return put_batch(Batch(ids, mask), p.mesh)


def start(p: Program) -> TrainState:
    """A state whose weights are all different from zero."""
    state = p.init_state()
    drawn = jax.tree.map(lambda w, a: jax.device_put(w, a.sharding), params(p.config), state.params)
    return TrainState(state.step, drawn, state.opt, state.recent)


class Run:
    """Two updates, measured; compiled once for all tests of the same settings. Numbers: as they leave the device."""

    def __init__(self, *settings: str, mesh: tuple[int, int, int]) -> None:
        p = self.program = built(*settings, mesh=mesh)
        state, self.step = start(p), make_train_step(p)
        self.layers = LayerSizes(p, state, batch_of(p))
        self.sizes, self.numbers, self.params = [], [], [jax.device_get(state.params)]
        for i in range(2):
            batch = batch_of(p, i)
            self.before = self.layers.before(state, batch)
            state, metrics = self.step(state, batch)
            self.numbers.append(np.asarray(self.layers.after(self.before, state, metrics)))
            self.sizes.append(self.layers.layout.split(self.numbers[-1]))
            self.params.append(jax.device_get(state.params))
        self.state = state


@cache
def run(*settings: str, mesh: tuple[int, int, int] = (1, 1, 1)) -> Run:
    return Run(*settings, mesh=mesh)


# One case by default; the rest is slow. 2 x 4: key/value heads that y does not divide; replicas: sums over z.
CASES = [(model, optimizer, mesh) for model in MODELS for optimizer in OPTIMIZERS for mesh in [(2, 4, 1), (2, 2, 2), (8, 1, 1)]]
FEW = [("all options", "adamw, coupled", (2, 4, 1))]
CASES = [case for case in CASES if not ("coupled" in case[1] and case[0].startswith("grouped"))]  # two rules exclude each other


@pytest.mark.parametrize(("model", "optimizer", "mesh"), slow_unless(FEW, CASES))
def test_every_size_is_that_of_one_device(model: str, optimizer: str, mesh: tuple[int, int, int]) -> None:
    settings = [*MODELS[model], *OPTIMIZERS[optimizer]]
    ours, one = run(*settings, mesh=mesh), run(*settings)
    for numbers, want in zip(ours.numbers, one.numbers, strict=True):
        assert np.isfinite(want).all() and numbers == pytest.approx(want, rel=1e-3 if optimizer == "muon" else 1e-4)
    assert list(ours.sizes[0]) == list(QUANTITIES)
    assert all(len(ours.sizes[0]["activation"][name]) == 2 for name in ("residual", "query"))


ALL = [*MODELS["all options"], *OPTIMIZERS["adamw, coupled"]]


def test_a_mean_over_the_wrong_devices_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the largest of the devices' mean squares in place of their mean."""
    monkeypatch.setattr(layer_sizes, "mean_devices", lambda x: jax.lax.pmax(x, ("x", "y")))
    p = built(*ALL, mesh=(2, 4, 1))
    wrong = jax.jit(lambda w, b: activation_sizes(p, w, b))(start(p).params, batch_of(p))
    right = run(*ALL).sizes[0]["activation"]
    assert max(np.max(abs(np.asarray(wrong[name]) / right[name] - 1)) for name in right) > 0.01


def test_activations_are_those_of_the_coordinate_check() -> None:
    """All of `Forward.intermediates`, and no others; the logits without those of the padding."""
    p = run(*ALL).program

    def sizes(values: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(values.astype(jnp.float32)), axis=tuple(range(1, values.ndim))))

    def whole(weights: Any, batch: Batch) -> dict[str, jax.Array]:
        seen = p.forward.intermediates(weights, shift_right(batch.tokens, 1, None), None)
        found = {name: sizes(x if len(x) == 2 else x[None]) for name, x in seen.items()}
        found |= {"logits": sizes(seen["logits"][None, :, :, :REAL]), "padded": sizes(seen["logits"][None])}
        return jax.tree.map(lambda a: jax.lax.pmean(a, ("x", "y")), found)

    mapped = jax.shard_map(whole, mesh=p.mesh, in_specs=(p.forward.pspecs, p.batch_pspec), out_specs=PartitionSpec())
    want = jax.device_get(jax.jit(mapped)(start(p).params, batch_of(p)))
    found = run(*ALL).sizes[0]["activation"]
    assert found["logits"] != pytest.approx(want.pop("padded").item(), rel=1e-4), "the padding makes no difference"
    assert found.keys() == want.keys()
    for name, size in want.items():
        assert np.ravel(found[name]) == pytest.approx(size, rel=1e-4), name


# A width twice that of the base, and factors on the rates. Muon trains the matrices of the layers, and Adam the rest.
FIRST = ["optim.lr=0.001", "optim.lr_factors.hidden=3", "optim.eps=1e-30", "optim.schedule=constant", "model.norm_scale=vector"]
each_optimizer = pytest.mark.parametrize(("optimizer",), slow_unless([("muon",)], [(name,) for name in OPTIMIZERS]))


@each_optimizer
def test_gradients_are_those_of_the_loss_and_updates_those_of_the_weights(optimizer: str) -> None:
    """Though they are read off the optimizer's moments, and off the weights before and after."""
    ran = run(*OPTIMIZERS[optimizer], *FIRST)
    p, sizes = ran.program, ran.sizes[1]
    _, grads = jax.device_get(jax.jit(make_loss_and_grads(p))(ran.params[1], batch_of(p, 1)))
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
    assert norm > 2 * p.config.optim.clip_norm, "it is not clipped: nothing is shown"
    before, now = (named(params) for params in ran.params[1:])
    for name, spec in named(p.specs).items():
        whole = {"gradient": named(grads)[name], "weight": before[name], "update": now[name] - before[name]}
        for quantity, values in whole.items():
            if spec.dims[0].name == "V":
                values = values[:REAL]
            elif spec.dims[-1].name == "V":
                values = values[..., :REAL]
            axes = tuple(i for i, dim in enumerate(spec.dims) if dim.name != "L")
            want = np.sqrt(np.mean(np.square(values), axis=axes))
            assert np.ravel(sizes[quantity][name]) == pytest.approx(np.ravel(want), rel=2e-4), f"{quantity} of {name}"
        ratio = np.ravel(sizes["update"][name]) / np.ravel(sizes["weight"][name])
        assert np.ravel(sizes["update_to_weight"][name]) == pytest.approx(ratio, rel=1e-3)


@each_optimizer
def test_a_first_update_is_as_large_as_expected_of_every_weight(optimizer: str) -> None:
    """A direction of entries ±1, or an orthogonal matrix. What decay removes does not count; if it did, this would fail."""
    ran = run(*OPTIMIZERS[optimizer], *FIRST)
    p, sizes = ran.program, ran.sizes[0]
    for name, weight in named(p.specs).items():
        # The iteration of Muon gives singular values between 0.7 and 1.2. Of an embedding some rows may have no gradient.
        rel = 0.3 if optimizer == "muon" else 2e-3
        if name != "embed":
            assert np.ravel(sizes["update_to_expected"][name]) == pytest.approx(1, rel=rel), name
        if weight.is_matrix and p.config.optim.decay == "independent":
            whole = np.ravel(sizes["update"][name]) / (0.001 * named(p.optimizer.expected_updates())[name])
            assert (abs(whole - 1) > 0.5).all(), f"decay of {name} is too small to be seen"


BITS = [(FEW[0][0], "lion"), ("relu", "adamw"), ("relu", "muon")]


@pytest.mark.parametrize(("model", "optimizer"), slow_unless(BITS[:1], BITS))
def test_measuring_leaves_every_bit_of_the_state(model: str, optimizer: str) -> None:
    ran = run(*MODELS[model], *OPTIMIZERS[optimizer], mesh=(2, 2, 2))
    p, plain = ran.program, start(ran.program)
    for i in range(2):
        assert bits(plain) != bits(ran.state)
        plain, _ = ran.step(plain, batch_of(p, i))
    assert bits(plain) == bits(ran.state)


def test_the_train_step_is_the_same_program_with_and_without() -> None:
    def text(*settings: str) -> str:
        p = built("mesh.replicas=1", *settings)
        return make_train_step(p).lower(p.state, batch_of(p)).as_text()

    assert text("log.layers=10") == text("log.layers=0") != text("optim.lr=0.5")


def test_a_skipped_step_has_no_update_and_no_gradient_that_is_known() -> None:
    ran = run(*OPTIMIZERS["muon"], *FIRST)
    state, batch = start(ran.program), batch_of(ran.program)
    state = TrainState(state.step, jax.tree.map(lambda w: w * jnp.nan, state.params), state.opt, state.recent)
    before = ran.layers.before(state, batch)
    after, metrics = ran.step(state, batch)
    broken = ran.layers.layout.split(np.asarray(ran.layers.after(before, after, metrics)))
    assert float(metrics["skipped"]) == 1 and np.isnan(broken["gradient"]["w_q"]).all()
    good = ran.layers.after(ran.before, ran.state, metrics | {"skipped": jnp.float32(1)})
    assert np.isnan(ran.layers.layout.split(np.asarray(good))["gradient"]["w_q"]).all()
    assert np.isfinite(ran.sizes[1]["gradient"]["w_q"]).all()


def test_numbers_come_back_under_their_names() -> None:
    layout = Layout(3, {"residual": True, "final": False}, {"w_q": True, "embed": False}, {"w_q": "hidden", "embed": "input"})
    n = 4 + 5 * 4
    sizes = layout.split(np.arange(n, dtype=np.float32))
    assert sizes["activation"] == {"residual": [0, 1, 2], "final": 3}
    assert [sizes[quantity]["w_q"][0] for quantity in OF_WEIGHTS] == [4, 8, 12, 16, 20]
    joined = layout.join(jax.tree.map(jnp.asarray, sizes, is_leaf=lambda node: not isinstance(node, dict)))
    assert np.asarray(joined).tolist() == list(range(n))
