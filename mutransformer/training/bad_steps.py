"""Steps that must not change the model: a loss or a gradient that is not finite or, if asked for, far above those before.

The decision is taken within the step, from numbers that are equal on all devices, and before the update: weights and moments then
stay as they are, bit for bit, and no second copy of them is needed.
"""

from typing import Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from mutransformer.config.run import BadStepsConfig

WINDOW = 128  # good steps that a spike is compared with
ENOUGH = 32  # good steps before anything is a spike

T = TypeVar("T")  # Array, ShapeDtypeStruct, NamedSharding


class Recent(eqx.Module, Generic[T]):
    """Losses and gradient norms of the latest good steps, part of the state, so that a resumed run decides as it would have."""

    values: T  # float32 [2, WINDOW], a ring
    count: T  # int32 scalar, good steps so far


def no_steps(config: BadStepsConfig) -> Recent[Array] | None:
    """Before the first step; None if spikes are not looked for."""
    return Recent(jnp.zeros((2, WINDOW)), jnp.zeros((), jnp.int32)) if config.spike else None


def judge(
    config: BadStepsConfig, recent: Recent[Array] | None, loss: Float[Array, ""], gradient_norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], Recent[Array] | None]:
    """Whether a step is good, and the latest good steps after it."""
    now = jnp.stack([loss, gradient_norm]).astype(jnp.float32)
    good = jnp.all(jnp.isfinite(now))
    if recent is None:
        return good, None
    n = jnp.minimum(recent.count, WINDOW)
    valid = jnp.arange(WINDOW) < n
    mean = jnp.sum(recent.values, axis=1, where=valid) / jnp.maximum(n, 1)
    variance = jnp.sum((recent.values - mean[:, None]) ** 2, axis=1, where=valid) / jnp.maximum(n, 1)
    spike = jnp.any(now > mean + config.spike * jnp.sqrt(variance)) & (recent.count >= ENOUGH)
    good &= ~spike
    values = jnp.where(good, recent.values.at[:, recent.count % WINDOW].set(now), recent.values)
    return good, Recent(values, recent.count + good.astype(jnp.int32))
