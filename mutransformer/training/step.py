"""One update, one evaluation: shard_map around loss and gradient, plain optax on global arrays around that."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float

from mutransformer.data.batches.rows import Batch
from mutransformer.errors import translate_errors
from mutransformer.model.ops import shift_right
from mutransformer.model.weights import Transformer
from mutransformer.sharding.collectives import sum_rows, sum_z, varying_as, varying_on_z
from mutransformer.training.bad_steps import judge
from mutransformer.training.program import Program, TrainState

Metrics = dict[str, Array]


def device_grads(program: Program, params: Transformer[Array], batch: Batch) -> tuple[Metrics, Any]:
    """As make_loss_and_grads, for one device inside shard_map: of its shards of the params and its rows."""
    optim, forward = program.config.optim, program.forward
    n = program.execution.microbatches
    once_per_step = n > 1 and optim.grad_sync == "step"  # weights stay gathered over x, and gradients are reduced once
    model = forward.for_gathered_weights() if once_per_step else forward
    count = jnp.maximum(1, sum_rows(jnp.sum(batch.mask, dtype=jnp.float32)))
    denominator = count
    if optim.loss_per == "position":
        denominator = sum_rows(jnp.sum(jnp.ones_like(batch.mask), dtype=jnp.float32))

    def objective(weights: Transformer[Array], microbatch: Batch) -> tuple[Array, Array]:
        objective, loss = model.loss(weights, *microbatch, program.bos_id)
        return sum_rows(objective) / denominator, sum_rows(loss) / denominator

    params = varying_on_z(params)
    weights, pullback = jax.vjp(forward.gather_weights, params) if once_per_step else (params, None)
    (value, loss), grads = _accumulate(objective, weights, batch, jnp.zeros_like(count), n)
    if pullback is not None:
        (grads,) = pullback(grads)
    return {"loss": loss * denominator / count, "objective": value}, sum_z(grads, forward.policy.grad_reduce_dtype)


def _accumulate(objective: Callable[..., Any], weights: Any, batch: Batch, zero: Array, n: int) -> Any:
    """((objective, loss), gradient), summed over n microbatches. zero varies over the same mesh axes as the loss."""
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    if n == 1:
        return value_and_grad(weights, batch)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(weights, microbatch)), None

    microbatches = jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), batch)
    zeros = (zero, zero), jax.tree.map(jnp.zeros_like, weights)  # a scan's carry keeps its type
    return lax.scan(add, zeros, microbatches)[0]


def make_loss_and_grads(program: Program) -> Callable[[Transformer[Array], Batch], tuple[Metrics, Any]]:
    """A function of (params, batch) that gives {loss, objective} and the gradient of the objective, summed over all devices.

    loss is the mean over unmasked targets, in nats. objective is what is differentiated: the loss plus the z-loss if there is
    one, and with optim.loss_per = position divided by the number of all positions. Not jitted.
    """
    pspecs = program.forward.pspecs
    in_specs, out_specs = (pspecs, program.batch_pspec), (PartitionSpec(), pspecs)
    return jax.shard_map(partial(device_grads, program), mesh=program.mesh, in_specs=in_specs, out_specs=out_specs)


def update(
    program: Program, state: TrainState[Array], metrics: Metrics, grads: Any, lr: Float[Array, ""] | float
) -> tuple[TrainState[Array], Metrics]:
    """The state after one optimizer update, on global arrays. lr: optim.lr, or an array that replaces it.

    After a bad step (training.bad_steps) the state differs from the one before in `step` alone. Added to the metrics:
    learning_rate (lr x schedule), gradient_norm (before clipping), parameter_norm and update_norm (after and of the update), and
    skipped (1 if the step is bad, else 0).
    """
    before: Any = state.params  # optax types trees of arrays as dict, list and tuple only
    gradient_norm = optax.tree.norm(grads)
    good, recent = judge(program.config.bad_steps, state.recent, metrics["loss"], gradient_norm)
    taken = cast(Any, state.opt)[-1].count  # of the schedule, the chain's last link; skipped steps do not count
    updates, opt = program.optimizer.transformation(lr).update(grads, state.opt, before)
    updates = jax.tree.map(lambda u: jnp.where(good, u, 0), updates)
    params: Any = jax.tree.map(lambda p, u: jnp.where(good, p + u, p), before, updates)
    opt = jax.tree.map(lambda new, old: jnp.where(good, new, old), opt, state.opt)
    norms = {
        "learning_rate": lr * program.optimizer.schedule(taken),
        "gradient_norm": gradient_norm,
        "parameter_norm": optax.tree.norm(params),
        "update_norm": optax.tree.norm(updates),
        "skipped": 1.0 - good,
    }
    return TrainState(state.step + 1, params, opt, recent), metrics | norms


def make_train_step(program: Program) -> jax.stages.Wrapped:
    """The jitted update: (state, batch) -> (state, metrics). The state is donated: use the returned one.

    Metrics, float32 scalars: loss and objective (before the update), and those of `update`. Raises ConfigError if the devices'
    compiler refuses an option in config.xla.
    """
    loss_and_grads, mesh = make_loss_and_grads(program), program.mesh

    def train_step(state: TrainState[Array], batch: Batch) -> tuple[TrainState[Array], Metrics]:
        metrics, grads = loss_and_grads(state.params, batch)
        return update(program, state, metrics, grads, program.config.optim.lr)

    options = dict(program.execution.compiler_options)
    if program.config.xla and mesh.devices.flat[0] in jax.devices():
        with translate_errors("xla", jax.errors.JaxRuntimeError):
            jax.jit(lambda: jnp.zeros(()), compiler_options=options)()
    return jax.jit(train_step, donate_argnums=0, out_shardings=(program.state_shardings, None), compiler_options=options)


def device_sums(program: Program, params: Transformer[Array], batch: Batch) -> tuple[Array, Array]:
    """As make_eval_step, for one device inside shard_map: of its shards of the params and its rows."""
    _, loss = program.forward.loss(params, *batch, program.bos_id)
    return sum_rows(loss), sum_rows(jnp.sum(batch.mask, dtype=jnp.int32))


def make_eval_step(program: Program) -> Callable[[Transformer[Array], Batch], tuple[Array, Array]]:
    """The jitted sum of losses over unmasked targets, in nats, and the number of these targets."""
    sums, in_specs = partial(device_sums, program), (program.forward.pspecs, program.batch_pspec)
    mapped = jax.shard_map(sums, mesh=program.mesh, in_specs=in_specs, out_specs=PartitionSpec())
    return jax.jit(mapped, compiler_options=dict(program.execution.other_options))


def make_position_sums(program: Program) -> Callable[[Transformer[Array], Batch], tuple[Array, Array]]:
    """The jitted sums [T] of losses over unmasked targets at each position, in nats, and the numbers of these targets.

    Position t has read t tokens: it counts from the beginning of the row or, with segments, of its segment.
    """

    def sums(params: Transformer[Array], batch: Batch) -> tuple[Array, Array]:
        losses = program.forward.target_losses(params, *batch, program.bos_id)
        at = jnp.broadcast_to(jnp.arange(losses.shape[1])[None], losses.shape)
        if batch.segments is not None:
            begins = batch.segments != jnp.pad(batch.segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
            at = at - lax.cummax(jnp.where(begins, at, 0), axis=1)

        def by_position(values: Array) -> Array:
            zeros = varying_as(jnp.zeros(losses.shape[1], values.dtype), values, at)
            return sum_rows(zeros.at[at].add(values))

        return by_position(losses), by_position(batch.mask.astype(jnp.int32))

    in_specs = (program.forward.pspecs, program.batch_pspec)
    mapped = jax.shard_map(sums, mesh=program.mesh, in_specs=in_specs, out_specs=PartitionSpec())
    return jax.jit(mapped, compiler_options=dict(program.execution.other_options))


def make_logits(program: Program) -> Callable[..., Float[Array, "B T V"]]:
    """The jitted logits over the padded vocabulary, a function of (params, tokens [B, T], segments [B, T] or None).

    Position t has read the tokens before t; with segments, only those of its own segment.
    """
    forward, rows = program.forward, program.batch_pspec
    mapped = jax.shard_map(
        lambda params, tokens, segments: forward.logits(params, shift_right(tokens, program.bos_id, segments), segments),
        mesh=program.mesh,
        in_specs=(forward.pspecs, rows, rows),
        out_specs=PartitionSpec(*rows, None, "y"),
    )
    return jax.jit(lambda params, tokens, segments=None: mapped(params, tokens, segments))
