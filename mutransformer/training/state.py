"""What a run carries from step to step: the state, its abstract form with shardings, and its initial values."""

from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Int

from mutransformer.model.weights import Transformer
from mutransformer.mup import Scaling, init_weights
from mutransformer.sharding.mesh import AnyMesh, replicated, shardings
from mutransformer.sharding.spec import Weight
from mutransformer.training.optim import Optimizer

T = TypeVar("T")  # Array, ShapeDtypeStruct, NamedSharding


class TrainState(eqx.Module, Generic[T]):
    """Attributes:
    step: int32 scalar, updates completed.
    params: float32 master weights.
    opt: the optimizer's state; moments are sharded like their weights.
    """

    step: T
    params: Transformer[T]
    opt: optax.OptState


def initial_state(
    specs: Transformer[Weight], scaling: Scaling, optimizer: Optimizer, seed: Int[Array, ""] | int
) -> TrainState[Array]:
    """The state before the first update, with no sharding of its own. seed: may be an array."""
    params = init_weights(specs, scaling, seed)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt=optimizer.transformation().init(params))


def abstract_state(
    specs: Transformer[Weight], scaling: Scaling, optimizer: Optimizer, mesh: AnyMesh
) -> TrainState[jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the whole state: what a checkpoint is restored into. Computes nothing."""
    shapes = jax.eval_shape(lambda: initial_state(specs, scaling, optimizer, 0))
    params: Any = shardings(specs, mesh)

    def moments_or_scalar(node: Any) -> Any:
        """Moments are trees of weights, sharded like these; None where another optimizer trains the weight."""
        if not isinstance(node, Transformer):
            return replicated(mesh)
        return jax.tree.map(lambda m, s: None if m is None else s, node, params, is_leaf=lambda m: m is None)

    # jit of the optimizer's init alone would drop the moments' shardings: they are given, not propagated.
    opt = jax.tree.map(moments_or_scalar, shapes.opt, is_leaf=lambda node: isinstance(node, Transformer))
    sharded = TrainState(step=replicated(mesh), params=params, opt=opt)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, sharded)
