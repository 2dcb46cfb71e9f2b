"""One update, one evaluation: shard_map around loss and gradient, plain optax on global arrays around that."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from mutransformer.collectives import sum_x
from mutransformer.config import Config
from mutransformer.data.pipeline import Batch
from mutransformer.model import Forward, Transformer, specs
from mutransformer.ops import shift_right
from mutransformer.optim import make_optimizer, make_schedule
from mutransformer.state import TrainState, plan

Metrics = dict[str, Array]
ROWS = PartitionSpec("x")


def make_loss_and_grads(config: Config, mesh: Mesh, bos_id: int) -> Callable[[Transformer[Array], Batch], tuple[Metrics, Any]]:
    """A function of (params, batch) that gives {loss, objective} and the gradient of the objective, summed over all devices.

    loss is the mean over unmasked targets, in nats. objective is what is differentiated: the same, or with
    optim.loss_per = position the sum over unmasked targets divided by all positions. Not jitted.
    """
    forward, parts = Forward(config), config.optim.accumulate

    def grads_of(params: Transformer[Array], tokens: Int[Array, "b T"], mask: Array) -> tuple[Metrics, Any]:
        count = jnp.maximum(1, sum_x(jnp.sum(mask, dtype=jnp.float32)))
        per = count if config.optim.loss_per == "target" else sum_x(jnp.sum(jnp.ones_like(mask), dtype=jnp.float32))

        def objective(params: Transformer[Array], part: Batch) -> Array:
            return sum_x(forward.loss(params, part.tokens, part.mask, bos_id)) / per

        if parts == 1:
            value, grads = jax.value_and_grad(objective)(params, Batch(tokens, mask))
        else:
            split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), Batch(tokens, mask))

            def add(total: tuple[Array, Any], part: Batch) -> tuple[tuple[Array, Any], None]:
                return jax.tree.map(jnp.add, total, jax.value_and_grad(objective)(params, part)), None

            zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
            (value, grads), _ = lax.scan(add, zero, split)
        return {"loss": value * per / count, "objective": value}, grads

    mapped = jax.shard_map(
        grads_of, mesh=mesh, in_specs=(forward.pspecs, ROWS, ROWS), out_specs=(PartitionSpec(), forward.pspecs)
    )
    return lambda params, batch: mapped(params, batch.tokens, batch.mask)


def make_train_step(config: Config, mesh: Mesh, bos_id: int) -> jax.stages.Wrapped:
    """The jitted update: (state, batch) -> (state, metrics). The state is donated: use the one returned.

    Metrics, float32 scalars: loss, objective (as above, before the update), learning_rate (the peak rate x schedule),
    gradient_norm (before clipping), parameter_norm and update_norm (after and of the update).
    """
    loss_and_grads = make_loss_and_grads(config, mesh, bos_id)
    tx = make_optimizer(config, specs(config))
    schedule = make_schedule(config.optim, config.steps)
    places = plan(config, mesh).shardings

    def train_step(state: TrainState[Array], batch: Batch) -> tuple[TrainState[Array], Metrics]:
        metrics, grads = loss_and_grads(state.params, batch)
        before: Any = state.params  # optax knows trees of arrays only by dict, list and tuple
        updates, opt = tx.update(grads, state.opt, before)
        params: Any = optax.apply_updates(before, updates)
        metrics |= {
            "learning_rate": config.optim.lr * schedule(state.step),
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        return TrainState(state.step + 1, params, opt), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))


def make_eval_step(config: Config, mesh: Mesh, bos_id: int) -> Callable[[Transformer[Array], Batch], tuple[Array, Array]]:
    """The jitted sum of losses over unmasked targets, in nats, and the number of those targets."""
    forward = Forward(config)

    def sums(params: Transformer[Array], tokens: Int[Array, "b T"], mask: Array) -> tuple[Array, Array]:
        return sum_x(forward.loss(params, tokens, mask, bos_id)), sum_x(jnp.sum(mask, dtype=jnp.int32))

    mapped = jax.shard_map(sums, mesh=mesh, in_specs=(forward.pspecs, ROWS, ROWS), out_specs=PartitionSpec())
    return jax.jit(lambda params, batch: mapped(params, batch.tokens, batch.mask))


def make_logits(config: Config, mesh: Mesh, bos_id: int) -> Callable[[Transformer[Array], Array], Float[Array, "B T V"]]:
    """The jitted logits of rows of tokens [B, T], over the padded vocabulary; position t has read the tokens before t."""
    forward = Forward(config)
    mapped = jax.shard_map(
        lambda params, tokens: forward.logits(params, shift_right(tokens, bos_id)),
        mesh=mesh,
        in_specs=(forward.pspecs, ROWS),
        out_specs=PartitionSpec("x", None, "y"),
    )
    return jax.jit(mapped)
