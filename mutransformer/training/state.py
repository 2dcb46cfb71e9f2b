"""What a run carries from step to step: its abstract form, its resting places and its start, all from the specs."""

from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from mutransformer.config.schema import Config
from mutransformer.model.transformer import Transformer, specs
from mutransformer.mup import rules as mup
from mutransformer.sharding.mesh import AnyMesh, replicated, shardings
from mutransformer.training.optim import make_optimizer

T = TypeVar("T")  # Array, ShapeDtypeStruct, NamedSharding


class TrainState(eqx.Module, Generic[T]):
    """Attributes:
    step: int32 scalar, updates completed.
    params: float32 master weights.
    opt: the optimizer's state; moments rest where their weights do.
    """

    step: T
    params: Transformer[T]
    opt: optax.OptState


class Plan(NamedTuple):
    """Attributes:
    shapes: a TrainState of ShapeDtypeStruct with shardings: what a checkpoint is restored into.
    shardings: a TrainState of NamedSharding.
    """

    shapes: TrainState[jax.ShapeDtypeStruct]
    shardings: TrainState[NamedSharding]


def plan(config: Config, mesh: AnyMesh) -> Plan:
    """Shapes and shardings of the whole state. Computes nothing."""
    weights = specs(config)
    tx = make_optimizer(config, weights)
    shapes = jax.eval_shape(lambda: start(config))
    places: Any = shardings(weights, mesh)
    # jit of tx.init alone would drop the moments' shardings: they are given, not propagated. Where weights have optimizers of
    # different kinds, each kind's moments have masks in the place of the others' weights.
    opt = optax.tree_map_params(
        tx,
        lambda moment, place: moment if _is_mask(moment) else place,
        shapes.opt,
        places,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_mask,
    )
    state = TrainState(step=replicated(mesh), params=places, opt=opt)
    return Plan(jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, state), state)


def _is_mask(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def init_state(config: Config, mesh: Mesh) -> TrainState[Array]:
    """The state before the first update, drawn in place: bit for bit the same on every mesh."""
    return jax.jit(lambda: start(config), out_shardings=plan(config, mesh).shardings)()


def start(config: Config, seed: Int[Array, ""] | int | None = None) -> TrainState[Array]:
    """The same, not placed anywhere.

    Args:
        config: of the run.
        seed: where it is an array; None: the config's.
    """
    weights = specs(config)
    params = mup.init(weights, config, seed)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt=make_optimizer(config, weights).init(params))
