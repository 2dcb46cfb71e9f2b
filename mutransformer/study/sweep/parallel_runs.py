"""Training of many runs of one shape at once: the train step is mapped over arrays of base learning rates and seeds.

Runs are divided among the devices, and each device holds its runs whole: only losses move between devices, when they are read. On
accelerators a device's runs are vectorized. On a CPU they are computed one after another within one program: its matrix products
are fast for two factors, not for stacks of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Real

from mutransformer.config.schema import Config
from mutransformer.data.batches.rows import Batch
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.sharding.mesh import data_share, lay_mesh, put_batch
from mutransformer.study.sweep.grid import Point
from mutransformer.training.program import TrainState, Vocabulary, build, initial_state
from mutransformer.training.step import Metrics, device_grads, device_sums, make_eval_step, make_train_step, update

RUNS = PartitionSpec("run")
BATCHES = PartitionSpec(None, "x")  # [seeds, rows, T], the same on every device


class Hyper(NamedTuple):
    """What differs between the runs, arrays [R]."""

    lr: Any  # float32, the base learning rate
    seed: Any  # int32, of the weights
    data: Any  # int32, the index of the run's batch among those of the distinct seeds


class ParallelRuns:
    """R runs divided among the devices, a multiple of their number. The train state is stacked over runs.

    `config` is that of the runs, whose learning rates and seeds may differ; `seeds` are distinct and ascending; `data_share` says
    which rows of a batch this process reads, as mesh.data_share does; `shapes` is the abstract train state, with shardings.
    """

    layout = "in parallel"  # for log messages

    def __init__(
        self,
        config: Config,
        vocabulary: Tokenizer | Vocabulary,
        points: Sequence[Point],
        devices: Sequence[Any] = (),
        sequential: bool | None = None,
    ):
        """Compiles nothing yet. Without devices all are used.

        The learning rates and seeds of the points take the place of the config's. `sequential` says whether a device computes its
        runs one after another or vectorized; None: whichever is faster there.
        """
        devices = devices or jax.devices()
        assert len(points) % len(devices) == 0, f"{len(points)} runs on {len(devices)} devices"
        one_device = replace(config, mesh=replace(config.mesh, x=1, y=1, replicas=1))
        self.program = build(one_device, devices[:1], vocabulary)
        self.config, self.data_share = self.program.config, (1, (0,))  # every process reads whole batches
        self.seeds = sorted({seed for _, seed in points})
        self.mesh = lay_mesh(devices, run=len(devices), x=1, y=1)
        self._sequential = devices[0].platform == "cpu" if sequential is None else sequential
        per_run, self._batches = NamedSharding(self.mesh, RUNS), NamedSharding(self.mesh, BATCHES)
        lr, seed = zip(*points, strict=True)
        hyper = Hyper(np.array(lr, np.float32), *np.array([seed, [self.seeds.index(s) for s in seed]], np.int32))
        self.hyper = jax.tree.map(lambda a: _put(a, per_run), hyper)

        p = self.program
        self.pspecs = jax.tree.map(lambda spec: PartitionSpec("run", *spec), p.forward.pspecs)
        grads = self.map(partial(device_grads, p), self.pspecs, (RUNS, self.pspecs))
        sums = self.map(partial(device_sums, p), self.pspecs, RUNS)

        def init(hyper: Hyper) -> TrainState[Array]:
            return jax.vmap(lambda seed: initial_state(p.optimizer, seed, p.config.bad_steps))(hyper.seed)

        def step(state: TrainState[Array], batches: Batch, hyper: Hyper) -> tuple[TrainState[Array], Array]:
            metrics, gradients = grads(state.params, batches, hyper.data)
            state, metrics = jax.vmap(partial(update, p))(state, metrics, gradients, hyper.lr)
            return state, _loss(metrics)

        shapes = jax.eval_shape(init, self.hyper)
        self.shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=per_run), shapes)
        self._init = jax.jit(init, out_shardings=per_run)
        self._step: Any = jax.jit(step, donate_argnums=0, out_shardings=per_run)
        self._sums = jax.jit(lambda params, batch: sums(params, batch, jnp.zeros_like(self.hyper.data)))
        # Replicates the losses, so that every process can read them; until then they stay where their runs are.
        self._gather = jax.jit(jnp.stack, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[[Any, Batch, Array], Any]:
        """A per-device function of one run's (weights, batch), as step.device_grads of a program -> one of all runs, not jitted.

        That is a function of (stacked weights, batches of all seeds, index of each run's batch [R]); in_specs and out_specs are
        those of the stacked weights, or whatever tree takes their place, and of the stacked results.
        """

        def on_device(weights: Any, batches: Batch, data: Array) -> Any:
            def one(run: tuple[Any, Array]) -> Any:
                weights, index = run
                return function(weights, jax.tree.map(lambda a: a[index], batches))

            return jax.lax.map(one, (weights, data)) if self._sequential else jax.vmap(one)((weights, data))

        return jax.shard_map(on_device, mesh=self.mesh, in_specs=(in_specs, BATCHES, RUNS), out_specs=out_specs)

    def place(self, batches: Sequence[Batch]) -> Batch:
        """One batch of host arrays [B, T] for each of `seeds` -> arrays [seeds, B, T] on the devices."""
        return jax.tree.map(lambda *a: _put(np.stack(a), self._batches), *batches)

    def init(self) -> TrainState[Array]:
        """The state before the first update: for each run, bit for bit the state that it would start with alone."""
        return self._init(self.hyper)

    def step(self, state: TrainState[Array], batches: Sequence[Batch]) -> tuple[TrainState[Array], Float[Array, " R"]]:
        """One update of every run.

        Takes a state, which is donated, and for each of `seeds` this process's rows of a batch, host arrays [B, T]. Returns the
        new state, and the losses before the update in nats per token, on the devices: NaN where the gradient was not finite.
        """
        return self._step(state, self.place(batches), self.hyper)

    def loss_sums(self, state: TrainState[Array], batch: Batch) -> tuple[Float[Array, " R"], Real[Array, " R"]]:
        """(sum of losses in nats, number of unmasked targets) of every run on one batch."""
        return self._sums(state.params, self.place([batch]))

    def read(self, numbers: Sequence[Array]) -> Real[np.ndarray, "n R"]:
        """Losses or counts of n steps, on the host."""
        return np.asarray(self._gather(list(numbers)))

    def compile(self) -> int:
        """Compiles the step. Returns its peak memory on one device in bytes, according to the compiler."""
        b, t = self.config.data.batch_size, self.config.data.seq_len
        tokens, mask = (jax.ShapeDtypeStruct((len(self.seeds), b, t), d, sharding=self._batches) for d in (jnp.int32, jnp.bool_))
        batches = Batch(tokens, mask, tokens if self.config.data.intra_document_mask else None)
        self._step = self._step.lower(self.shapes, batches, self.hyper).compile()
        memory: Any = self._step.memory_analysis()
        sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes
        return sum(sizes) - memory.alias_size_in_bytes


class ShardedRun:
    """One run, sharded over all devices as in ordinary training: for a model that does not fit on one device.

    Its methods are those of ParallelRuns, with losses and counts of shape [] on the devices and R = 1 on the host.
    """

    layout = "sharded"

    def __init__(self, config: Config, vocabulary: Tokenizer | Vocabulary, point: Point):
        """Raises ConfigError if the devices cannot divide the model."""
        lr, seed = point
        config = replace(config, seed=seed, optim=replace(config.optim, lr=lr))
        self.program, self.seeds = build(config, vocabulary=vocabulary), [seed]
        self.config, self.mesh, self.shapes = self.program.config, self.program.mesh, self.program.state
        self.data_share = data_share(self.mesh)
        self._step, self._sums = make_train_step(self.program), make_eval_step(self.program)

    def init(self) -> TrainState[Array]:
        return self.program.init_state()

    def step(self, state: TrainState[Array], batches: Sequence[Batch]) -> tuple[TrainState[Array], Array]:
        state, metrics = self._step(state, put_batch(batches[0], self.mesh))
        return state, _loss(metrics)

    def loss_sums(self, state: TrainState[Array], batch: Batch) -> tuple[Array, Array]:
        return self._sums(state.params, put_batch(batch, self.mesh))

    def read(self, numbers: Sequence[Array]) -> Real[np.ndarray, "n 1"]:
        return np.array([[np.asarray(number)] for number in numbers])


RunGroup = ParallelRuns | ShardedRun


def mean_losses(group: RunGroup, state: TrainState[Array], batches: Sequence[Batch]) -> Float[np.ndarray, " R"]:
    """The mean loss of each run over the unmasked targets of all batches, in nats per token."""
    sums = [group.loss_sums(state, batch) for batch in batches]
    totals, counts = (group.read(numbers).astype(np.float64).sum(axis=0) for numbers in zip(*sums, strict=True))
    return totals / counts


def _put(a: np.ndarray, sharding: NamedSharding) -> Array:
    """A host array that every process has whole -> a global array."""
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


def _loss(metrics: Metrics) -> Array:
    """The loss of a step; NaN if it was skipped for its gradient: in a sweep a run that goes on by skipping has diverged."""
    return jnp.where(jnp.isfinite(metrics["gradient_norm"]), metrics["loss"], jnp.nan)
