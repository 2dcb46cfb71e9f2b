"""The sizes of each layer's activations, gradients, weights and updates, measured around an update.

Sizes are root mean squares over the whole batch and whole weights, on any mesh. The train step is the same compiled program with
and without them: activations come from a forward pass of their own, and the rest from the states before and after the update. So
no backend can round an update differently because of them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float

from mutransformer.data.batches.rows import Batch
from mutransformer.model.ops import shift_right
from mutransformer.model.weights import Transformer
from mutransformer.mup.checks.slopes import ACTIVATIONS
from mutransformer.mup.roles import path_of
from mutransformer.sharding.collectives import mean_devices
from mutransformer.sharding.mesh import replicated
from mutransformer.sharding.spec import Weight
from mutransformer.training.program import Program, TrainState
from mutransformer.training.step import Metrics

# Activations, gradients (before clipping; NaN for a skipped step) and weights are from before the update. update: what is added
# to the weight. update_to_weight: its size / the weight's. update_to_expected: its size without weight decay, relative to
# Optimizer.expected_updates.
OF_WEIGHTS = ("gradient", "weight", "update", "update_to_weight", "update_to_expected")
QUANTITIES = ("activation", *OF_WEIGHTS)

_METRICS = ("learning_rate", "gradient_norm", "skipped")  # of the train step, that the sizes depend on

Sizes = dict[str, dict[str, Any]]  # by quantity, then by name: one number for each layer, or one for what is not in a layer


@dataclass(frozen=True)
class Layout:
    """The names and order of the numbers of a model's statistics, which leave the device as one array."""

    n_layer: int
    activations: dict[str, bool]  # by name, in the order of the forward pass: whether each layer has one
    weights: dict[str, bool]
    roles: dict[str, str]  # of the weights, by name

    @staticmethod
    def of(program: Program) -> "Layout":
        specs = named(program.specs)
        return Layout(
            n_layer=program.config.model.n_layer,
            activations={name: name not in ("final", "logits") for name in ACTIVATIONS},
            weights={name: _layers_of(w) is not None for name, w in specs.items()},
            roles={name: w.role for name, w in specs.items()},
        )

    def names(self, quantity: str) -> dict[str, bool]:
        return self.activations if quantity == "activation" else self.weights

    def join(self, sizes: Sizes) -> Float[Array, " n"]:
        return jnp.concatenate([sizes[q][name].reshape(-1) for q in QUANTITIES for name in self.names(q)])

    def split(self, numbers: Float[np.ndarray, " n"]) -> Sizes:
        """What was joined: lists of floats, and floats, of five digits."""
        found, at = dict[str, dict[str, Any]](), 0
        for quantity in QUANTITIES:
            found[quantity] = {}
            for name, in_layers in self.names(quantity).items():
                size = self.n_layer if in_layers else 1
                values = [float(f"{x:.5g}") for x in numbers[at : at + size].tolist()]
                found[quantity][name] = values if in_layers else values[0]
                at += size
        assert at == numbers.size
        return found


class Before(NamedTuple):
    """What is kept of the state before an update, and what the model computes with it."""

    activations: dict[str, Any]  # sizes
    params: Transformer[Any]
    moments: Transformer[Any]


class LayerSizes:
    """Measures the layers around an update. Meanwhile the weights and first moments of before it are kept: on a mesh of n
    devices 8 / n bytes more of each parameter on a device, with float32 moments."""

    def __init__(self, program: Program, state: TrainState[Array], batch: Batch) -> None:
        """Compiles, for a state and a batch like those that follow."""
        self.layout = layout = Layout.of(program)
        optimizer = program.optimizer

        def before(state: TrainState[Array], batch: Batch) -> Before:
            sizes = activation_sizes(program, state.params, batch)
            kept: Any = jax.tree.map(jnp.copy, (state.params, optimizer.first_moments(state.opt)))
            return Before(sizes, *kept)

        def after(was: Before, state: TrainState[Array], metrics: Metrics) -> Float[Array, " n"]:
            moments = was.moments, optimizer.first_moments(state.opt)
            gradients = optimizer.gradients(*moments, metrics["gradient_norm"])
            sizes = weight_sizes(program, was.params, state.params, gradients, metrics)
            return layout.join({"activation": was.activations, **sizes})

        everywhere = replicated(program.mesh)
        kept = (program.state_shardings.params, optimizer.first_moments(program.state_shardings.opt))
        places = Before(dict.fromkeys(layout.activations, everywhere), *kept)
        self._before: Any = jax.jit(before, out_shardings=places).lower(state, batch).compile()
        was = jax.tree.map(_abstract, jax.eval_shape(before, state, batch), places)
        metrics = {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere) for name in _METRICS}
        self._after: Any = jax.jit(after, out_shardings=everywhere).lower(was, program.state, metrics).compile()

    def before(self, state: TrainState[Array], batch: Batch) -> Before:
        """Of the state that the update will start with, and its batch."""
        return self._before(state, batch)

    def after(self, was: Before, state: TrainState[Array], metrics: Metrics) -> Float[Array, " n"]:
        """The sizes, for `layout.split`, the same on every device. state, metrics: of the train step."""
        return self._after(was, state, {name: metrics[name] for name in _METRICS})


def _abstract(a: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def activation_sizes(program: Program, params: Transformer[Array], batch: Batch) -> dict[str, Array]:
    """The size of each of `Forward.intermediates` over the rows of the batch: [L], or []."""
    in_specs = program.forward.pspecs, program.batch_pspec
    mapped = jax.shard_map(partial(_mean_squares, program), mesh=program.mesh, in_specs=in_specs, out_specs=PartitionSpec())
    return jax.tree.map(jnp.sqrt, mapped(params, batch))


def _mean_squares(program: Program, params: Transformer[Array], batch: Batch) -> dict[str, Array]:
    """Over all devices, inside shard_map: of this device's shards of the params and its rows, a microbatch at a time."""

    def of_rows(rows: Batch) -> dict[str, Array]:
        inputs = shift_right(rows.tokens, program.bos_id, rows.segments)
        return program.forward.mean_squares(params, inputs, rows.segments)

    n = program.execution.microbatches
    microbatches = jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), batch)
    found = of_rows(batch) if n == 1 else jax.tree.map(lambda a: jnp.mean(a, axis=0), lax.map(of_rows, microbatches))
    return jax.tree.map(mean_devices, found)


def weight_sizes(program: Program, before: Any, after: Any, grads: Any, metrics: Metrics) -> Sizes:
    """The sizes of OF_WEIGHTS by name: [L], or []. before, after: the weights. metrics: of the train step.

    Rows and columns of the padded vocabulary do not count.
    """
    optimizer, n_vocab = program.optimizer, program.config.model.n_vocab
    assert n_vocab is not None
    learning_rate, skipped = metrics["learning_rate"], metrics["skipped"] > 0
    of = partial(jax.tree.map, partial(_size, n_vocab=n_vocab))
    updates = jax.tree.map(jnp.subtract, after, before)
    # Decay would hide the gradient's part of an update of a weight that has grown.
    decayed = jnp.where(skipped, 0, learning_rate / optimizer.c.lr)
    shares = optimizer.decay_shares()
    undecayed = jax.tree.map(lambda u, w, share: u + decayed * share * w if share else u, updates, before, shares)
    gradient, weight, update, direction = (named(of(tree, program.specs)) for tree in (grads, before, updates, undecayed))
    expected = named(optimizer.expected_updates())
    return {
        "gradient": {name: jnp.where(skipped, jnp.nan, size) for name, size in gradient.items()},  # no moment has taken it
        "weight": weight,
        "update": update,
        "update_to_weight": {name: update[name] / weight[name] for name in update},
        "update_to_expected": {name: direction[name] / (learning_rate * expected[name]) for name in direction},
    }


def _size(x: Array, spec: Weight, n_vocab: int) -> Array:
    """The root mean square of a weight, or what there is one of per weight: [L], or []."""
    count = spec.size // (_layers_of(spec) or 1)
    for i, dim in enumerate(spec.dims):
        if dim.name == "V" and dim.size > n_vocab:
            real = jnp.arange(dim.size) < n_vocab
            x = jnp.where(real.reshape(-1, *[1] * (x.ndim - i - 1)), x, 0)
            count = count // dim.size * n_vocab
    total = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(i for i, dim in enumerate(spec.dims) if dim.name != "L"))
    return jnp.sqrt(total / count)


def _layers_of(spec: Weight) -> int | None:
    """The number of layers that a weight is stacked over; None: it is not in a layer."""
    return spec.dims[0].size if spec.dims and spec.dims[0].name == "L" else None


def named(tree: Transformer[Any]) -> dict[str, Any]:
    """What there is one of per weight by the weight's name: w_q, embed."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path).removeprefix("blocks."): leaf for path, leaf in leaves}
