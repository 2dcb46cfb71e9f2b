"""The numbers of the reference system (lucaslingle/mu_transformer): our model, loss and optimizer give the same."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import program
from reference import KEYS, Case, read, settings
from tokens import loss_mask

from mutransformer.config.load import load
from mutransformer.data.batches.pipeline import Batch
from mutransformer.sharding.mesh import make_mesh, put_batch
from mutransformer.training.program import TrainState
from mutransformer.training.step import make_logits, make_loss_and_grads, make_train_step

HERE = Path(__file__).parent / "data"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        given = metafunc.config.getoption("--reference-dir")
        paths = sorted(HERE.glob("*.npz")) + (sorted(Path(given).glob("*.npz")) if given else [])
        assert paths, f"no .npz in {HERE} or {given}"
        unique = {path.stem: path for path in paths}
        metafunc.parametrize("case", unique.values(), ids=unique.keys(), indirect=True)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return read(request.param)


def distance(ours: object, theirs: object) -> float:
    """|ours - theirs| / |theirs|; the distance itself where theirs is zero."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1))


def distances(ours: object, theirs: object) -> dict[str, float]:
    paths = jax.tree_util.tree_leaves_with_path(theirs)
    return {jax.tree_util.keystr(p): distance(a, b) for (p, b), a in zip(paths, jax.tree.leaves(ours), strict=True)}


def batches(case: Case) -> list[Batch]:
    """One batch an update: of as many of the case's batches as an update accumulates."""
    k = case.config.optim.grad_accumulation_steps or 1
    o = case.options
    merged = case.tokens.reshape(-1, k * case.tokens.shape[1], case.tokens.shape[2])
    return [Batch(t, np.asarray(loss_mask(t, o["eos_token_id"], o["pad_token_id"]))) for t in merged]


def test_forward_loss_and_gradients(case: Case) -> None:
    mesh = make_mesh(case.config.mesh, jax.devices()[:1])
    bos = case.options["bos_token_id"]
    o = case.options
    logits = make_logits(program(case.config, mesh, bos))(case.init, jnp.asarray(case.tokens[0]))
    assert distance(logits, case.logits0) <= 1e-5

    first = Batch(case.tokens[0], np.asarray(loss_mask(case.tokens[0], o["eos_token_id"], o["pad_token_id"])))
    one = settings({**o, "grad_acc_steps": 1})
    metrics, grads = jax.jit(make_loss_and_grads(program(load(one), mesh, bos)))(case.init, put_batch(first, mesh))
    assert distance(metrics["loss"], case.loss_avg[0]) <= 1e-5
    assert distance(metrics["objective"], case.objective[0]) <= 1e-5
    wrong = {k: d for k, d in distances(grads, case.grad0).items() if d > 1e-5}
    assert not wrong


OPTIONS = ["mesh.overlap_groups=2", "model.remat=dots", "model.head_chunk=5"]


def test_gradients_with_what_makes_a_step_fast(case: Case) -> None:
    """With streams, kept activations, few logits at a time; tests/test_sharding.py says that a mesh changes nothing more."""
    o = case.options
    first = Batch(case.tokens[0], np.asarray(loss_mask(case.tokens[0], o["eos_token_id"], o["pad_token_id"])))
    config = load([*settings({**o, "grad_acc_steps": 1}), *OPTIONS])
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    metrics, grads = jax.jit(make_loss_and_grads(program(config, mesh, o["bos_token_id"])))(case.init, put_batch(first, mesh))
    assert distance(metrics["loss"], case.loss_avg[0]) <= 1e-5
    assert not {k: d for k, d in distances(grads, case.grad0).items() if d > 1e-5}


def test_updates(case: Case) -> None:
    mesh = make_mesh(case.config.mesh, jax.devices()[:1])
    k = case.config.optim.grad_accumulation_steps or 1
    tx = program(case.config, jax.devices()[:1]).optimizer.transformation()
    params = jax.tree.map(jnp.asarray, case.init)
    state = jax.device_put(
        TrainState(jnp.zeros((), jnp.int32), params, tx.init(params)), program(case.config, mesh).state_shardings
    )
    step = make_train_step(program(case.config, mesh, case.options["bos_token_id"]))
    for i, batch in enumerate(batches(case)):
        state, metrics = step(state, put_batch(batch, mesh))
        assert distance(metrics["objective"], np.mean(case.objective[k * i : k * i + k])) <= 1e-5
        if k == 1:
            assert distance(metrics["loss"], case.loss_avg[i]) <= 1e-5
    assert int(state.step) == len(case.tokens) // k
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, case.init)
    theirs = jax.tree.map(lambda a, b: a - b, case.final, case.init)
    wrong = {k: d for k, d in distances(moved, theirs).items() if d > 1e-3}
    assert not wrong


def test_every_option_of_the_reference_is_known(case: Case) -> None:
    assert set(KEYS) <= set(case.options), "a case lacks an option: the mapping names one that does not exist"
    with pytest.raises(ValueError, match="no counterpart"):
        settings({**case.options, "n_expert": 4})
