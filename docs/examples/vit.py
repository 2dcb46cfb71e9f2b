"""muP for a vision Transformer: the orientation of gratings of random phase, in noise.

The size of a head stays fixed, so that the scale of attention does not depend on the width.

python docs/examples/vit.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mutransformer import mup

BASE, WIDTHS = {"width": 32}, [32, 128]
CHECKED = [32, 64, 128, 256]  # of the coordinate check
LRS = [2.0 ** (i / 2) for i in range(-17, -8)]  # half octaves, since the curves are skewed
STEPS = 100
SIDE, PATCH, D_HEAD, CLASSES = 16, 4, 8, 8
# One of its dims grows, as of an unembedding. A position picks a row of it, as a token does of an embedding: an input.
OVERRIDE: dict[str, mup.LeafRole] = {"positions": "input"}


class Vit(eqx.Module):
    patches: eqx.nn.Conv2d
    positions: Array
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width: int, key: Array):
        keys = jax.random.split(key, 6)
        self.patches = eqx.nn.Conv2d(1, width, PATCH, PATCH, key=keys[0])
        self.positions = 0.5 * jax.random.normal(keys[1], ((SIDE // PATCH) ** 2, width))
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(3)]
        self.attention = eqx.nn.MultiheadAttention(width // D_HEAD, width, key=keys[2])
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[3])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[4])
        self.head = eqx.nn.Linear(width, CLASSES, key=keys[5])

    def __call__(self, image: Array) -> Array:
        """[SIDE, SIDE] -> logits [CLASSES]."""
        x = self.patches(image[None]).reshape(self.positions.shape[1], -1).T + self.positions
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        y = jax.vmap(self.up)(jax.vmap(self.norms[1])(x))
        x = x + jax.vmap(self.down)(jax.nn.gelu(y))
        return self.head(jax.vmap(self.norms[2])(x).mean(axis=0))


@jax.jit
def batch(step: int, seed: int) -> tuple[Array, Array]:
    a, b, c = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
    y = jax.random.randint(a, (32,), 0, CLASSES)
    angle, phase = y * jnp.pi / CLASSES, 2 * jnp.pi * jax.random.uniform(b, (32,))
    rows, columns = jnp.mgrid[:SIDE, :SIDE]
    wave = rows[None] * jnp.sin(angle)[:, None, None] + columns[None] * jnp.cos(angle)[:, None, None]
    return jnp.sin(wave + phase[:, None, None]) + 2.0 * jax.random.normal(c, wave.shape), y


def loss(model: Vit, batch: tuple[Array, Array]) -> Array:
    images, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(images), y).mean()


def roles() -> mup.Roles:
    make = lambda width: Vit(width, jax.random.key(0))  # noqa: E731
    return mup.infer(make, BASE, {"width": 48}, override=OVERRIDE).at(width=WIDTHS[-1])


def check() -> mup.CoordinateReport:
    return mup.coord_check(Vit, loss, lambda seed: batch(0, seed), CHECKED, base=BASE, seeds=2, override=OVERRIDE)


def transfer() -> mup.TransferReport:
    unseen = [batch(step, 99) for step in range(8)]  # the same for all runs: their noise cancels where runs are compared
    runs = mup.sweep(
        Vit,
        loss,
        batch,
        WIDTHS,
        LRS,
        base=BASE,
        steps=STEPS,
        seeds=(0, 1, 2),
        schedule=lambda step: 1 - step / STEPS,  # to 0: at a constant rate the last losses are noisy
        validation=unseen,
        override=OVERRIDE,
    )
    return mup.transfer_report(runs, max_drift=1.0)


if __name__ == "__main__":
    print(roles().table(), check(), transfer(), sep="\n\n")
