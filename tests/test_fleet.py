"""Runs trained at once are the runs trained one by one: the same start, the same losses, and nothing passes between them."""

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import Batch
from mutransformer.data.cache.dataset import TokenSplit
from mutransformer.sharding.mesh import make_mesh, put
from mutransformer.study.sweep.parallel_runs import Fleet, Sharded
from mutransformer.training.evaluate import evaluate
from mutransformer.training.state import TrainState, init_state, plan
from mutransformer.training.step import make_eval_step, make_train_step

BOS, STEPS = 1, 5
RUNS = [(0.002, 3), (0.002, 0), (0.03, 3), (0.03, 0)]  # seeds not in order: a run must find its own batch
TINY = [
    "model.d_model=32",
    "model.d_base=16",
    "model.d_head=8",
    "model.n_layer=2",
    "model.n_vocab=250",
    "data.seq_len=16",
    "data.batch_size=4",
    "optim.warmup_steps=2",
    f"steps={STEPS}",
]
MODELS = {
    "gains, biases, qk_norm": ["model.norm_scale=vector", "model.biases=true", "model.qk_norm=true", "precision.compute=float32"],
    "in parts, bfloat16": ["optim.grad_accumulation_steps=2", "optim.weight_decay=0.01", "precision.compute=bfloat16"],
}
A, B = MODELS
TOKENS = TokenSplit("validation", (), ())  # evaluate asks it for bytes a token only


class Alone(NamedTuple):
    losses: np.ndarray  # [R, steps]
    validation: np.ndarray  # [R]


def setting(model: str) -> Config:
    return load([*TINY, *MODELS[model]])


def at_point(config: Config, lr: float, seed: int) -> Config:
    return dataclasses.replace(config, seed=seed, optim=dataclasses.replace(config.optim, lr=lr))


def batch(config: Config, seed: int, step: int) -> Batch:
    """Some targets are masked out, not the same number in each."""
    rng = np.random.default_rng([seed, step])
    shape = config.data.batch_size, config.data.seq_len
    return Batch(rng.integers(0, 250, shape, dtype=np.int32), rng.random(shape) < 0.8)


def held_out(config: Config) -> list[Batch]:
    return [batch(config, 1000, i) for i in range(2)]


@cache
def start_alone(model: str, seed: int) -> TrainState:
    """On the host."""
    config = at_point(setting(model), 1.0, seed)
    return jax.device_get(init_state(config, make_mesh(config.mesh, jax.devices()[:1])))


@cache
def alone(model: str) -> Alone:
    """What each run gives by itself on one device: the train step and evaluation of scripts/train.py.

    Only the last two runs of the second model, to save a compilation; the others are not a number.
    """
    config = setting(model)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    eval_step = make_eval_step(config, mesh, BOS)
    runs = RUNS if model == A else RUNS[2:]
    steps = {lr: make_train_step(at_point(config, lr, 0), mesh, BOS) for lr in {lr for lr, _ in runs}}
    losses = [[math.nan] * STEPS] * (len(RUNS) - len(runs))
    validation = [math.nan] * (len(RUNS) - len(runs))
    for lr, seed in runs:
        state = jax.device_put(start_alone(model, seed), plan(config, mesh).shardings)
        losses.append([])
        for i in range(STEPS):
            state, metrics = steps[lr](state, put(batch(config, seed, i), mesh))
            losses[-1].append(float(metrics["loss"]))
        validation.append(evaluate(eval_step, state.params, held_out(config), mesh, TOKENS).results["loss"])
    return Alone(np.array(losses), np.array(validation))


class Trained(NamedTuple):
    fleet: Fleet
    n_bytes: int
    losses: np.ndarray  # [R, steps]
    state: TrainState


@cache
def trained(model: str, n: int, one_by_one: bool) -> Trained:
    """All runs at once on n devices, and the step's memory on one of them."""
    fleet = Fleet(setting(model), BOS, RUNS, jax.devices()[:n], one_by_one)
    n_bytes = fleet.compile()
    return Trained(fleet, n_bytes, *train(fleet))


def train(one: Fleet | Sharded, own: Sequence[int] | None = None) -> tuple[np.ndarray, TrainState]:
    """Losses [R, steps], and the state at the end. own: the seeds whose batches the runs get, if not theirs."""
    state, losses = one.init(), []
    for i in range(STEPS):
        state, loss = one.step(state, [batch(one.config, seed, i) for seed in own or one.seeds])
        losses.append(loss)
    return one.read(losses).T, state


@cache
def trained_sharded() -> tuple[Sharded, np.ndarray, TrainState]:
    """The third run of the first model on a mesh, its step compiled: losses [1, steps], and the state at the end."""
    one: Any = Sharded(load([*TINY, *MODELS[A], "mesh.x=4", "mesh.y=2"]), BOS, RUNS[2])
    one._step = one._step.lower(one.shapes, put(batch(one.config, 0, 0), one.mesh)).compile()
    return one, *train(one)


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference from what is known."""
    assert np.isfinite(ours).all()
    return float(np.nanmax(np.abs(ours - theirs)))


FLEETS = [(A, 2, False), (A, 4, True), (B, 1, False), (B, 2, True)]


SOONER = [pytest.param(*fleet, marks=pytest.mark.slow) if fleet == (B, 1, False) else fleet for fleet in FLEETS]


@pytest.mark.parametrize(("model", "n", "one_by_one"), SOONER)
def test_losses_are_those_of_each_run_alone(model: str, n: int, one_by_one: bool) -> None:
    # Vectorised, a product of matrices adds up in another order, and bfloat16 rounds the last bit of that another way.
    allowed = 1e-5 if model == A or one_by_one else 5e-4
    fleet, _, losses, state = trained(model, n, one_by_one)
    assert apart(losses, alone(model).losses) <= allowed
    assert apart(fleet.evaluate(state, held_out(fleet.config)), alone(model).validation) <= allowed
    assert np.asarray(state.step).tolist() == [STEPS] * len(RUNS)


def test_the_runs_of_the_test_above_differ_by_far_more_than_it_allows() -> None:
    """The control: a run with another's learning rate, seed or batches would be seen."""
    for model in MODELS:
        losses, validation = alone(model)
        known = np.flatnonzero(np.isfinite(validation))
        assert len(known) == {A: 4, B: 2}[model] and np.isfinite(losses[known]).all()
        for i in known:
            for j in known[known < i]:
                assert apart(losses[i, -1], losses[j, -1]) > 1e-3 and apart(validation[i], validation[j]) > 1e-3
    fleet = trained(A, 2, False).fleet
    swapped, _ = train(fleet, own=fleet.seeds[::-1])
    assert np.min(np.abs(swapped - alone(A).losses)) > 1e-3


@pytest.mark.parametrize(("model", "n", "one_by_one"), [(A, 2, False), (B, 2, True)])
def test_every_run_starts_as_it_would_alone_bit_for_bit(model: str, n: int, one_by_one: bool) -> None:
    stacked = jax.device_get(trained(model, n, one_by_one).fleet.init())
    for i, (_, seed) in enumerate(RUNS):
        want = start_alone(model, seed)
        jax.tree.map(lambda ours, theirs, i=i: np.testing.assert_array_equal(ours[i], theirs), stacked, want)
    assert np.all(stacked.params.embed[0] != stacked.params.embed[1]), "two seeds start alike"


@pytest.mark.parametrize(("model", "n", "one_by_one"), [fleet for fleet in FLEETS if fleet[1] > 1])
def test_each_device_holds_its_own_runs_whole(model: str, n: int, one_by_one: bool) -> None:
    fleet, _, _, state = trained(model, n, one_by_one)
    each = len(RUNS) // n
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(fleet.shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype) and leaf.sharding.is_equivalent_to(
            shape.sharding, leaf.ndim
        )
        held = {shard.device: (shard.index[0], shard.data.shape) for shard in leaf.addressable_shards}
        own = {device: slice(i * each, (i + 1) * each) for i, device in enumerate(jax.devices()[:n])}
        assert held == {device: (runs, (each, *leaf.shape[1:])) for device, runs in own.items()}


def collectives(compiled: str) -> list[str]:
    """The instructions in a compiled program that move anything between devices.

    One within groups of a single device moves nothing: along x or y of a fleet.
    """
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast|all-to-all|send|recv"
    found = re.findall(rf"^.*= .*\b(?:{kinds})(?:-start)?\(.*$", compiled, re.MULTILINE)
    return [line for line in found if not alone_in_its_group(line)]


def alone_in_its_group(line: str) -> bool:
    """As older and newer versions of XLA write it: device by device, or as axes of the mesh, all of size 1."""
    if by_axis := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axis[1]))
        return {sizes[axis] for axis in re.findall(r"'(\w+)'", by_axis[2])} == {"1"}
    return bool(re.search(r"replica_groups=(\{(\{\d+\},?)+\}|\[\d+,1\])", line))


@pytest.mark.parametrize(("model", "n", "one_by_one"), [fleet for fleet in FLEETS if fleet[1] > 1])
def test_nothing_moves_between_devices_in_a_step(model: str, n: int, one_by_one: bool) -> None:
    compiled = trained(model, n, one_by_one).fleet._step.as_text()
    assert f"num_partitions={n}" in compiled and not collectives(compiled)


def test_the_search_for_collectives_finds_them() -> None:
    """The control: a step on a mesh has them, and so has reading the losses of runs on several devices."""
    one, _, _ = trained_sharded()
    step: Any = one._step
    found = "\n".join(collectives(step.as_text()))
    assert all(kind in found for kind in ("all-reduce", "all-gather"))
    fleet = trained(A, 4, True).fleet
    assert collectives(fleet._gather.lower([fleet.hyper.lr]).compile().as_text() or "")


@pytest.mark.parametrize(("model", "n", "one_by_one"), [(A, 2, False), (B, 2, True)])
def test_a_diverging_run_harms_no_other(model: str, n: int, one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, _, calm, calm_state = trained(model, n, one_by_one)
    lrs = np.asarray(fleet.hyper.lr).copy()
    lrs[1] = 1e30  # shares a device with the first, and its batches with the last
    monkeypatch.setattr(fleet, "hyper", fleet.hyper._replace(lr=jax.device_put(lrs, fleet.hyper.lr.sharding)))
    wild, wild_state = train(fleet)
    assert np.isfinite(calm).all() and not np.isfinite(wild[1, -1])
    for i in (0, 2, 3):
        np.testing.assert_array_equal(wild[i], calm[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]), *jax.device_get((wild_state, calm_state)))


def test_the_compiler_tells_what_a_step_takes() -> None:
    told = {(model, n): trained(model, n, one_by_one) for model, n, one_by_one in FLEETS}
    for (_, n), found in told.items():
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(found.state)) / n  # a device's share of weights and moments
        assert own < found.n_bytes < 5 * own
    assert told[A, 2].n_bytes > told[A, 4].n_bytes and told[B, 1].n_bytes > told[B, 2].n_bytes


def test_a_run_too_wide_for_a_device_is_trained_sharded_with_the_same_losses() -> None:
    one, losses, state = trained_sharded()
    assert losses.shape == (1, STEPS) and one.seeds == [RUNS[2][1]]
    assert apart(losses[0], alone(A).losses[2]) <= 1e-5
    assert apart(one.evaluate(state, held_out(one.config)), alone(A).validation[2:3]) <= 1e-5
    embed = state.params.embed
    assert [shard.data.size for shard in embed.addressable_shards] == [embed.size // 8] * 8


def test_runs_that_do_not_divide_among_the_devices_are_refused() -> None:
    with pytest.raises(AssertionError, match="4 runs on 8 devices"):
        Fleet(setting(A), BOS, RUNS)
