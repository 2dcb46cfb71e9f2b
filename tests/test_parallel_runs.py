"""Runs trained in parallel equal runs trained alone: the same start, the same losses, and no communication between them."""

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from cases import slow_unless
from programs import program

from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import Batch
from mutransformer.data.cache.dataset import TokenSplit
from mutransformer.sharding.mesh import make_mesh, put_batch
from mutransformer.study.sweep.parallel_runs import ParallelRuns, RunGroup, ShardedRun, mean_losses
from mutransformer.training.evaluate import evaluate
from mutransformer.training.program import TrainState, Vocabulary
from mutransformer.training.step import make_eval_step, make_train_step

BOS, STEPS = 1, 5
VOCABULARY = Vocabulary(250, BOS)
RUNS = [(0.002, 3), (0.002, 0), (0.03, 3), (0.03, 0)]  # seeds not ascending: a run must select its own batch
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
    "optim.lr_factors.output=1",  # with the default two of the runs that should differ come within 1e-3 by chance
]
MODELS = {
    "gains, biases, qk_norm": ["model.norm_scale=vector", "model.biases=true", "model.qk_norm=true", "precision.compute=float32"],
    "in parts, bfloat16": ["optim.grad_accumulation_steps=2", "optim.weight_decay=0.01", "precision.compute=bfloat16"],
}
A, B = MODELS
TOKENS = TokenSplit("validation", (), ())  # evaluate only takes bytes per token from it


class Alone(NamedTuple):
    losses: np.ndarray  # [R, steps]
    validation: np.ndarray  # [R]


def setting(model: str) -> Config:
    return load([*TINY, *MODELS[model]])


def at_point(config: Config, lr: float, seed: int) -> Config:
    return dataclasses.replace(config, seed=seed, optim=dataclasses.replace(config.optim, lr=lr))


def batch(config: Config, seed: int, step: int) -> Batch:
    """With masked targets, a different number in each batch."""
    rng = np.random.default_rng([seed, step])
    shape = config.data.batch_size, config.data.seq_len
    return Batch(rng.integers(0, 250, shape, dtype=np.int32), rng.random(shape) < 0.8)


def held_out(config: Config) -> list[Batch]:
    return [batch(config, 1000, i) for i in range(2)]


@cache
def start_alone(model: str, seed: int) -> TrainState:
    """On the host."""
    config = at_point(setting(model), 1.0, seed)
    return jax.device_get(program(config, make_mesh(config.mesh, jax.devices()[:1])).init_state())


@cache
def alone(model: str) -> Alone:
    """Each run by itself on one device, by the train step and evaluation of ordinary training.

    Of the second model only the last two runs, to save a compilation; the others are NaN.
    """
    config = setting(model)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    eval_step = make_eval_step(program(config, mesh, BOS))
    runs = RUNS if model == A else RUNS[2:]
    steps = {lr: make_train_step(program(at_point(config, lr, 0), mesh, BOS)) for lr in {lr for lr, _ in runs}}
    losses = [[math.nan] * STEPS] * (len(RUNS) - len(runs))
    validation = [math.nan] * (len(RUNS) - len(runs))
    for lr, seed in runs:
        state = jax.device_put(start_alone(model, seed), program(config, mesh).state_shardings)
        losses.append([])
        for i in range(STEPS):
            state, metrics = steps[lr](state, put_batch(batch(config, seed, i), mesh))
            losses[-1].append(float(metrics["loss"]))
        validation.append(evaluate(eval_step, state.params, held_out(config), mesh, TOKENS).results["loss"])
    return Alone(np.array(losses), np.array(validation))


class Trained(NamedTuple):
    runs: ParallelRuns
    n_bytes: int
    losses: np.ndarray  # [R, steps]
    state: TrainState


@cache
def trained(model: str, n: int, sequential: bool) -> Trained:
    """All runs at once on n devices."""
    runs = ParallelRuns(setting(model), VOCABULARY, RUNS, jax.devices()[:n], sequential)
    n_bytes = runs.compile()
    return Trained(runs, n_bytes, *train(runs))


def train(group: RunGroup, seeds: Sequence[int] | None = None) -> tuple[np.ndarray, TrainState]:
    """Losses [R, steps], and the final state. seeds: whose batches the runs get instead of their own."""
    state, losses = group.init(), []
    for i in range(STEPS):
        state, loss = group.step(state, [batch(group.config, seed, i) for seed in seeds or group.seeds])
        losses.append(loss)
    return group.read(losses).T, state


@cache
def trained_sharded() -> tuple[ShardedRun, np.ndarray, TrainState]:
    """The third run of the first model on a mesh, its step compiled: losses [1, steps], and the final state."""
    one: Any = ShardedRun(load([*TINY, *MODELS[A], "mesh.x=4", "mesh.y=2"]), VOCABULARY, RUNS[2])
    one._step = one._step.lower(one.shapes, put_batch(batch(one.config, 0, 0), one.mesh)).compile()
    return one, *train(one)


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Leaves out what theirs does not know (NaN)."""
    assert np.isfinite(ours).all()
    return float(np.nanmax(np.abs(ours - theirs)))


CASES = [(A, 2, False), (A, 4, True), (B, 1, False), (B, 2, True)]
FEW = [(A, 4, True)]


@pytest.mark.parametrize(("model", "n", "sequential"), slow_unless(FEW, CASES))
def test_losses_equal_those_of_each_run_alone(model: str, n: int, sequential: bool) -> None:
    # Vectorized matrix products sum in another order, which bfloat16 rounds differently.
    allowed = 1e-5 if model == A or sequential else 5e-4
    runs, _, losses, state = trained(model, n, sequential)
    assert largest_difference(losses, alone(model).losses) <= allowed
    assert largest_difference(mean_losses(runs, state, held_out(runs.config)), alone(model).validation) <= allowed
    assert np.asarray(state.step).tolist() == [STEPS] * len(RUNS)


@pytest.mark.parametrize("model", [A, pytest.param(B, marks=pytest.mark.slow)])
def test_other_runs_differ_by_far_more_than_is_allowed(model: str) -> None:
    """The control: a run with the learning rate or seed of another would be detected."""
    losses, validation = alone(model)
    known = np.flatnonzero(np.isfinite(validation))
    assert len(known) == {A: 4, B: 2}[model] and np.isfinite(losses[known]).all()
    for i in known:
        for j in known[known < i]:
            assert (
                largest_difference(losses[i, -1], losses[j, -1]) > 1e-3
                and largest_difference(validation[i], validation[j]) > 1e-3
            )


def test_a_run_with_the_batches_of_another_would_be_detected() -> None:
    runs = trained(A, 4, True).runs
    swapped, _ = train(runs, seeds=runs.seeds[::-1])
    assert np.min(np.abs(swapped - alone(A).losses)) > 1e-3


@pytest.mark.parametrize(("model", "n", "sequential"), slow_unless([], [(A, 2, False), (B, 2, True)]))
def test_every_run_starts_bit_for_bit_as_alone(model: str, n: int, sequential: bool) -> None:
    stacked = jax.device_get(trained(model, n, sequential).runs.init())
    for i, (_, seed) in enumerate(RUNS):
        want = start_alone(model, seed)
        jax.tree.map(lambda ours, theirs, i=i: np.testing.assert_array_equal(ours[i], theirs), stacked, want)
    assert np.all(stacked.params.embed[0] != stacked.params.embed[1]), "two seeds start with equal weights"


@pytest.mark.parametrize(("model", "n", "sequential"), slow_unless(FEW, [case for case in CASES if case[1] > 1]))
def test_each_device_holds_whole_runs(model: str, n: int, sequential: bool) -> None:
    runs, _, _, state = trained(model, n, sequential)
    each = len(RUNS) // n
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(runs.shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype) and leaf.sharding.is_equivalent_to(
            shape.sharding, leaf.ndim
        )
        held = {shard.device: (shard.index[0], shard.data.shape) for shard in leaf.addressable_shards}
        own = {device: slice(i * each, (i + 1) * each) for i, device in enumerate(jax.devices()[:n])}
        assert held == {device: (index, (each, *leaf.shape[1:])) for device, index in own.items()}


def collectives(compiled: str) -> list[str]:
    """The instructions of a compiled program that move data between devices.

    A collective within groups of a single device moves none: along x or y.
    """
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast|all-to-all|send|recv"
    found = re.findall(rf"^.*= .*\b(?:{kinds})(?:-start)?\(.*$", compiled, re.MULTILINE)
    return [line for line in found if not alone_in_its_group(line)]


def alone_in_its_group(line: str) -> bool:
    """In the notation of older and newer versions of XLA: groups of devices, or axes of the mesh, all of size 1."""
    if by_axis := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axis[1]))
        return {sizes[axis] for axis in re.findall(r"'(\w+)'", by_axis[2])} == {"1"}
    return bool(re.search(r"replica_groups=(\{(\{\d+\},?)+\}|\[\d+,1\])", line))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "n", "sequential"), slow_unless(FEW, [case for case in CASES if case[1] > 1]))
def test_nothing_moves_between_devices_in_a_step(model: str, n: int, sequential: bool) -> None:
    compiled = trained(model, n, sequential).runs._step.as_text()
    assert f"num_partitions={n}" in compiled and not collectives(compiled)


@pytest.mark.slow
def test_collectives_are_found() -> None:
    """The control: a step on a mesh has collectives, and so has reading the losses of runs on several devices."""
    one, _, _ = trained_sharded()
    step: Any = one._step
    found = "\n".join(collectives(step.as_text()))
    assert all(kind in found for kind in ("all-reduce", "all-gather"))
    runs = trained(A, 4, True).runs
    assert collectives(runs._gather.lower([runs.hyper.lr]).compile().as_text() or "")


@pytest.mark.parametrize(("model", "n", "sequential"), slow_unless([], [(A, 2, False), (B, 2, True)]))
def test_a_diverging_run_does_not_affect_others(model: str, n: int, sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, _, calm, calm_state = trained(model, n, sequential)
    lrs = np.asarray(runs.hyper.lr).copy()
    lrs[1] = 1e30  # shares a device with the first, and its batches with the last
    monkeypatch.setattr(runs, "hyper", runs.hyper._replace(lr=jax.device_put(lrs, runs.hyper.lr.sharding)))
    wild, wild_state = train(runs)
    assert np.isfinite(calm).all() and not np.isfinite(wild[1, -1])
    for i in (0, 2, 3):
        np.testing.assert_array_equal(wild[i], calm[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]), *jax.device_get((wild_state, calm_state)))


@pytest.mark.slow
@pytest.mark.parametrize("cases", [CASES[:2], CASES[2:]])
def test_compile_returns_the_memory_of_a_step(cases: list[tuple[str, int, bool]]) -> None:
    fewer, more = (trained(*case) for case in cases)
    for (_, n, _), found in zip(cases, (fewer, more), strict=True):
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(found.state)) / n  # a device's share of weights and moments
        assert own < found.n_bytes < 5 * own
    assert fewer.n_bytes > more.n_bytes


def test_a_sharded_run_has_the_same_losses() -> None:
    one, losses, state = trained_sharded()
    assert losses.shape == (1, STEPS) and one.seeds == [RUNS[2][1]]
    assert largest_difference(losses[0], alone(A).losses[2]) <= 1e-5
    assert largest_difference(mean_losses(one, state, held_out(one.config)), alone(A).validation[2:3]) <= 1e-5
    embed = state.params.embed
    assert [shard.data.size for shard in embed.addressable_shards] == [embed.size // 8] * 8


def test_runs_must_divide_among_the_devices() -> None:
    with pytest.raises(AssertionError, match="4 runs on 8 devices"):
        ParallelRuns(setting(A), VOCABULARY, RUNS)
