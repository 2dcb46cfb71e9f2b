"""muP for a mixture of experts: each of several regions of the input has a teacher network of its own.

The experts are stacked in a leading dim that does not grow with width. The router is an output: its logits are as many at every
width.

python docs/examples/moe.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mutransformer import mup

BASE, WIDTHS = {"width": 32}, [32, 128]
CHECKED = [32, 64, 128, 256]  # of the coordinate check
LRS = [2.0 ** (i / 2) for i in range(-20, -10)]
EXPERTS, REGIONS, FEATURES, CLASSES = 4, 4, 16, 8
CENTERS = 1.5 * jax.random.normal(jax.random.key(98), (REGIONS, FEATURES))
TEACHERS = jax.random.normal(jax.random.key(99), (REGIONS, FEATURES, CLASSES))


class Experts(eqx.Module):
    """Feed-forward layers; an input goes to the two that the router prefers."""

    router: eqx.nn.Linear
    up: eqx.nn.Linear  # stacked: weight [EXPERTS, 2 width, width]
    down: eqx.nn.Linear  # stacked: weight [EXPERTS, width, 2 width]

    def __init__(self, width: int, key: Array):
        a, b, c = jax.random.split(key, 3)
        self.router = eqx.nn.Linear(width, EXPERTS, key=a)
        self.up = eqx.filter_vmap(lambda key: eqx.nn.Linear(width, 2 * width, key=key))(jax.random.split(b, EXPERTS))
        self.down = eqx.filter_vmap(lambda key: eqx.nn.Linear(2 * width, width, key=key))(jax.random.split(c, EXPERTS))

    def __call__(self, x: Array) -> Array:
        logits = self.router(x)
        kept = logits >= jax.lax.top_k(logits, 2)[0][1]
        shares = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf))
        each = eqx.filter_vmap(lambda up, down: down(jax.nn.gelu(up(x))))(self.up, self.down)
        return shares @ each


class Mixture(eqx.Module):
    first: eqx.nn.Linear
    experts: Experts
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, width: int, key: Array):
        a, b, c = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(FEATURES, width, key=a)
        self.experts = Experts(width, b)
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, CLASSES, key=c)

    def __call__(self, x: Array) -> Array:
        """[FEATURES] -> logits [CLASSES]."""
        y = jax.nn.gelu(self.first(x))
        return self.head(self.norm(y + self.experts(y)))


@jax.jit
def batch(step: int, seed: int) -> tuple[Array, Array]:
    a, b = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    region = jax.random.randint(a, (64,), 0, REGIONS)
    noise = jax.random.normal(b, (64, FEATURES))
    return CENTERS[region] + noise, jnp.einsum("bf,bfc->bc", noise, TEACHERS[region]).argmax(axis=1)


def loss(model: Mixture, batch: tuple[Array, Array]) -> Array:
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


def roles() -> mup.Roles:
    return mup.infer(lambda width: Mixture(width, jax.random.key(0)), BASE, {"width": 48}).at(width=WIDTHS[-1])


def check() -> mup.CoordinateReport:
    return mup.coord_check(Mixture, loss, lambda seed: batch(0, seed), CHECKED, base=BASE, seeds=2)


def transfer() -> mup.TransferReport:
    runs = mup.sweep(Mixture, loss, batch, WIDTHS, LRS, base=BASE, steps=120, seeds=(0, 1))
    return mup.transfer_report(runs, max_drift=1.0)


if __name__ == "__main__":
    print(roles().table(), check(), transfer(), sep="\n\n")
