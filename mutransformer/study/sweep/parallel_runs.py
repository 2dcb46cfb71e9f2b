"""Many runs of one shape at once: base learning rate and seed are arrays, and the train step is mapped over them.

The runs are spread over the devices; each device holds its runs whole, and nothing moves between devices but the losses that are
read. On accelerators a device's runs are vectorised. A CPU computes them one after another in one program: its matrix products
are fast for two factors only, not for stacks of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Real

from mutransformer.config.schema import Config
from mutransformer.data.batches.pipeline import Batch
from mutransformer.model.transformer import Forward
from mutransformer.sharding.mesh import check_fits, data_share, lay, make_mesh, put
from mutransformer.training.state import TrainState, init_state, plan, start
from mutransformer.training.step import device_grads, device_sums, make_eval_step, make_train_step, update

RUNS = PartitionSpec("run")
BATCHES = PartitionSpec(None, "x")  # [distinct seeds, rows, T]: every device has them all


class Hyper(NamedTuple):
    """What differs between the runs: arrays [R].

    Attributes:
        lr: float32, the base learning rate.
        seed: int32, of the weights.
        data: int32, which of the batches given to the step is this run's.
    """

    lr: Any
    seed: Any
    data: Any


class Fleet:
    """R runs that share a config but for optim.lr and seed, in lockstep. R must be a multiple of the number of devices."""

    def __init__(
        self,
        config: Config,
        bos_id: int,
        runs: Sequence[tuple[float, int]],
        devices: Sequence[Any] | None = None,
        one_by_one: bool | None = None,
    ):
        """Compiles nothing yet.

        Args:
            config: of all runs, its vocabulary known.
            bos_id: of the tokenizer.
            runs: (base learning rate, seed) of each.
            devices: None for all.
            one_by_one: whether a device computes its runs one after another, or vectorised; None: as is faster there.
        """
        devices = jax.devices() if devices is None else devices
        assert len(runs) % len(devices) == 0, f"{len(runs)} runs on {len(devices)} devices"
        self.config = config
        self.data_share = 1, (0,)  # every process reads whole batches
        self.seeds = sorted({seed for _, seed in runs})  # one batch each
        self.mesh = lay(devices, run=len(devices), x=1, y=1)
        self._one_by_one = devices[0].platform == "cpu" if one_by_one is None else one_by_one
        spread = NamedSharding(self.mesh, RUNS)
        self.hyper = Hyper(
            lr=_put(np.array([lr for lr, _ in runs], np.float32), spread),
            seed=_put(np.array([seed for _, seed in runs], np.int32), spread),
            data=_put(np.array([self.seeds.index(seed) for _, seed in runs], np.int32), spread),
        )
        self.pspecs = jax.tree.map(lambda spec: PartitionSpec("run", *spec), Forward(config).pspecs)
        shapes = jax.eval_shape(self._start, self.hyper)
        places: Any = jax.tree.map(lambda _: spread, shapes)
        self.shapes: Any = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spread), shapes)
        self._init = jax.jit(self._start, out_shardings=places)
        grads = self.map(device_grads(config, bos_id), self.pspecs, (RUNS, self.pspecs))
        sums = self.map(device_sums(config, bos_id), self.pspecs, RUNS)

        def step(state: TrainState[Array], batches: Batch, hyper: Hyper) -> tuple[TrainState[Array], Array]:
            metrics, gradients = grads(state.params, batches, hyper.data)
            one = lambda s, m, g, lr: update(config, s, m, g, lr)  # noqa: E731  # typed nowhere: vmap's tracers are not arrays [R]
            state, metrics = jax.vmap(one)(state, metrics, gradients, hyper.lr)
            return state, metrics["loss"]

        self._step: Any = jax.jit(step, donate_argnums=0, out_shardings=(places, spread))
        self._sums = jax.jit(lambda params, batch: sums(params, batch, jnp.zeros_like(self.hyper.data)))
        # Losses rest where their runs do; only here do they meet, so that every process can read them.
        self._gather = jax.jit(jnp.stack, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        self._batches = NamedSharding(self.mesh, BATCHES)

    def _start(self, hyper: Hyper) -> TrainState[Array]:
        return jax.vmap(lambda seed: start(self.config, seed))(hyper.seed)

    def map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[[Any, Batch, Array], Any]:
        """A per-device function of one run's (weights, batch) -> one of all runs.

        Args:
            function: as step.device_grads gives them.
            in_specs: of the stacked weights, or whatever tree function takes in their place.
            out_specs: of its results, stacked.

        Returns:
            A function of (stacked weights, the batches of all seeds, for each run [R] which batch is its own). Not jitted.
        """

        def here(weights: Any, batches: Batch, data: Array) -> Any:
            def one(run: tuple[Any, Array]) -> Any:
                weights, own = run
                return function(weights, jax.tree.map(lambda a: a[own], batches))

            return jax.lax.map(one, (weights, data)) if self._one_by_one else jax.vmap(lambda *run: one(run))(weights, data)

        return jax.shard_map(here, mesh=self.mesh, in_specs=(in_specs, BATCHES, RUNS), out_specs=out_specs)

    def place(self, batches: Sequence[Batch]) -> Batch:
        """One batch of host arrays [B, T] for each of `seeds` -> arrays [seeds, B, T] on the devices."""
        return jax.tree.map(lambda *a: _put(np.stack(a), self._batches), *batches)

    def init(self) -> TrainState[Array]:
        """The state of every run before its first update, stacked: bit for bit what each would start with alone."""
        return self._init(self.hyper)

    def step(self, state: TrainState[Array], batches: Sequence[Batch]) -> tuple[TrainState[Array], Array]:
        """One update of every run.

        Args:
            state: stacked over runs; donated.
            batches: one for each of `seeds`, host arrays of all rows [B, T].

        Returns:
            The new state, and the losses [R] before the update in nats a token, still on the devices.
        """
        return self._step(state, self.place(batches), self.hyper)

    def read(self, numbers: Sequence[Array]) -> Real[np.ndarray, "n R"]:
        """Losses, or counts, of several steps on the host."""
        return np.asarray(self._gather(list(numbers)))

    def evaluate(self, state: TrainState[Array], batches: Sequence[Batch]) -> Float[np.ndarray, " R"]:
        """The mean loss of each run over the unmasked targets of batches, in nats a token."""
        sums = []
        for batch in batches:
            sums.append(self._sums(state.params, self.place([batch])))
        totals = self.read([total for total, _ in sums]).astype(np.float64).sum(axis=0)
        counts = self.read([count for _, count in sums]).astype(np.float64).sum(axis=0)
        return totals / counts

    def compile(self) -> int:
        """Compiles the step, and tells its peak memory on one device in bytes by the compiler's own account."""
        b, t = self.config.data.batch_size, self.config.data.seq_len
        tokens, mask = (jax.ShapeDtypeStruct((len(self.seeds), b, t), d, sharding=self._batches) for d in (jnp.int32, jnp.bool_))
        batches = Batch(tokens, mask, tokens if self.config.data.intra_document_mask else None)
        compiled = self._step.lower(self.shapes, batches, self.hyper).compile()
        self._step = compiled
        told: Any = compiled.memory_analysis()
        return told.argument_size_in_bytes + told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes


class Sharded:
    """One run, sharded over all devices like any training run; for widths that do not fit a device. As Fleet, with R = 1."""

    def __init__(self, config: Config, bos_id: int, run: tuple[float, int]):
        """Raises ConfigError if the devices cannot divide the model."""
        lr, seed = run
        config = dataclasses.replace(config, seed=seed, optim=dataclasses.replace(config.optim, lr=lr))
        self.config, self.seeds, self.mesh = config, [seed], make_mesh(config.mesh)
        check_fits(config, self.mesh)
        self.data_share = data_share(self.mesh)
        self.shapes = plan(config, self.mesh).shapes
        self._step = make_train_step(config, self.mesh, bos_id)
        self._sums = make_eval_step(config, self.mesh, bos_id)

    def init(self) -> TrainState[Array]:
        return init_state(self.config, self.mesh)

    def step(self, state: TrainState[Array], batches: Sequence[Batch]) -> tuple[TrainState[Array], Array]:
        state, metrics = self._step(state, put(batches[0], self.mesh))
        return state, metrics["loss"]

    def read(self, losses: Sequence[Array]) -> Float[np.ndarray, "n 1"]:
        return np.array([[float(loss)] for loss in losses], np.float32)

    def evaluate(self, state: TrainState[Array], batches: Sequence[Batch]) -> Float[np.ndarray, " 1"]:
        sums = [self._sums(state.params, put(batch, self.mesh)) for batch in batches]
        return np.array([sum(float(total) for total, _ in sums) / sum(int(count) for _, count in sums)])


def _put(a: np.ndarray, sharding: NamedSharding) -> Array:
    """An array that every process holds whole -> a global one."""
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])
