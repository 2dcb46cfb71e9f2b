"""One update, one evaluation: shard_map around loss and gradient, plain optax on global arrays around that."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from mutransformer.config.schema import Config, ConfigError
from mutransformer.data.batches.batch import Batch
from mutransformer.model.flags import compiler_options
from mutransformer.model.ops import shift_right
from mutransformer.model.transformer import Forward, Transformer, specs
from mutransformer.sharding.collectives import own_on_z, sum_rows, sum_z
from mutransformer.sharding.mesh import AnyMesh, rows
from mutransformer.training.optim import make_optimizer, make_schedule
from mutransformer.training.state import TrainState, plan

Metrics = dict[str, Array]


def device_grads(config: Config, bos_id: int) -> Callable[[Transformer[Array], Batch], tuple[Metrics, Any]]:
    """What one device computes inside shard_map: (its shards of the params, its rows) -> as make_loss_and_grads."""
    forward, parts = Forward(config), config.optim.grad_accumulation_steps
    on_whole = Forward(config, whole=True) if parts > 1 and config.optim.grad_sync == "step" else None

    def grads_of(params: Transformer[Array], batch: Batch) -> tuple[Metrics, Transformer[Array]]:
        count = jnp.maximum(1, sum_rows(jnp.sum(batch.mask, dtype=jnp.float32)))
        per = count if config.optim.loss_per == "target" else sum_rows(jnp.sum(jnp.ones_like(batch.mask), dtype=jnp.float32))

        def objective(params: Transformer[Array], part: Batch) -> tuple[Array, Array]:
            goal, loss = (on_whole or forward).loss(params, *part, bos_id)
            return sum_rows(goal) / per, sum_rows(loss) / per

        params = own_on_z(params)
        of_part = jax.value_and_grad(objective, has_aux=True)
        if parts == 1:
            (value, loss), grads = of_part(params, batch)
        else:
            split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)
            weights, back = jax.vjp(forward.gathered, params) if on_whole else (params, None)

            def add(total: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, of_part(weights, part)), None

            none = jnp.zeros_like(count)
            zero = (none, none), jax.tree.map(jnp.zeros_like, weights)
            ((value, loss), grads), _ = lax.scan(add, zero, split)
            if back is not None:
                (grads,) = back(grads)
        return {"loss": loss * per / count, "objective": value}, sum_z(grads, config.precision.grad_reduce_dtype)

    return grads_of


def make_loss_and_grads(config: Config, mesh: AnyMesh, bos_id: int) -> Callable[[Transformer[Array], Batch], tuple[Metrics, Any]]:
    """A function of (params, batch) that gives {loss, objective} and the gradient of the objective, summed over all devices.

    loss is the mean over unmasked targets, in nats. objective is what is differentiated: the same, with the z-loss if there is
    one, and with optim.loss_per = position divided by all positions. Not jitted.
    """
    pspecs = Forward(config).pspecs
    return jax.shard_map(
        device_grads(config, bos_id), mesh=mesh, in_specs=(pspecs, rows(mesh)), out_specs=(PartitionSpec(), pspecs)
    )


def update(
    config: Config, state: TrainState[Array], metrics: Metrics, grads: Any, lr: Float[Array, ""] | float
) -> tuple[TrainState[Array], Metrics]:
    """The state behind one optimizer update, on global arrays.

    Args:
        config: of the run.
        state: before the update.
        metrics: of the loss.
        grads: of the objective.
        lr: the base learning rate: optim.lr, or a traced stand-in.

    Returns:
        The new state, and metrics with learning_rate (lr x schedule), gradient_norm (before clipping), parameter_norm and
        update_norm (after and of the update) added.
    """
    tx = make_optimizer(config, specs(config), lr)
    before: Any = state.params  # optax knows trees of arrays only by dict, list and tuple
    updates, opt = tx.update(grads, state.opt, before)
    params: Any = optax.apply_updates(before, updates)
    norms = {
        "learning_rate": lr * make_schedule(config.optim, config.steps)(state.step),
        "gradient_norm": optax.tree.norm(grads),
        "parameter_norm": optax.tree.norm(params),
        "update_norm": optax.tree.norm(updates),
    }
    return TrainState(state.step + 1, params, opt), metrics | norms


def make_train_step(config: Config, mesh: Mesh, bos_id: int) -> jax.stages.Wrapped:
    """The jitted update: (state, batch) -> (state, metrics). The state is donated: use the one returned.

    Metrics, float32 scalars: loss, objective (as above, before the update), and what `update` adds.

    Raises:
        ConfigError: the devices' compiler refuses an option in config.xla.
    """
    loss_and_grads = make_loss_and_grads(config, mesh, bos_id)
    places = plan(config, mesh).shardings

    def train_step(state: TrainState[Array], batch: Batch) -> tuple[TrainState[Array], Metrics]:
        metrics, grads = loss_and_grads(state.params, batch)
        return update(config, state, metrics, grads, config.optim.lr)

    options = compiler_options(config, mesh.devices.flat[0].device_kind) or None
    if config.xla and mesh.devices.flat[0] in jax.devices():
        try:
            jax.jit(lambda: jnp.zeros(()), compiler_options=options)()
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(f"xla: {str(error).splitlines()[0]}") from None
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, None), compiler_options=options)


def device_sums(config: Config, bos_id: int) -> Callable[[Transformer[Array], Batch], tuple[Array, Array]]:
    """What one device computes inside shard_map: as make_eval_step."""
    forward = Forward(config)

    def sums(params: Transformer[Array], batch: Batch) -> tuple[Array, Array]:
        return sum_rows(forward.loss(params, *batch, bos_id)[1]), sum_rows(jnp.sum(batch.mask, dtype=jnp.int32))

    return sums


def make_eval_step(config: Config, mesh: Mesh, bos_id: int) -> Callable[[Transformer[Array], Batch], tuple[Array, Array]]:
    """The jitted sum of losses over unmasked targets, in nats, and the number of those targets."""
    in_specs = (Forward(config).pspecs, rows(mesh))
    return jax.jit(jax.shard_map(device_sums(config, bos_id), mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec()))


def make_logits(config: Config, mesh: Mesh, bos_id: int) -> Callable[..., Float[Array, "B T V"]]:
    """The jitted logits over the padded vocabulary, a function of (params, tokens [B, T], segments [B, T] or nothing).

    Position t has read the tokens before t; with segments, those of them that are of its own.
    """
    forward = Forward(config)
    mapped = jax.shard_map(
        lambda params, tokens, segments: forward.logits(params, shift_right(tokens, bos_id, segments), segments),
        mesh=mesh,
        in_specs=(forward.pspecs, rows(mesh), rows(mesh)),
        out_specs=PartitionSpec(*rows(mesh), None, "y"),
    )
    return jax.jit(lambda params, tokens, segments=None: mapped(params, tokens, segments))
