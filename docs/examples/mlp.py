"""muP for an MLP: classes that a random teacher network gives to random inputs.

python docs/examples/mlp.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mutransformer import mup

BASE, WIDTHS = {"width": 64}, [64, 256]
CHECKED = [64, 128, 256, 512]  # of the coordinate check
LRS = [2.0 ** (i / 2) for i in range(-21, -12)]
TEACHER = eqx.nn.MLP(16, 10, 64, 2, activation=jnp.tanh, key=jax.random.key(99))


def make_model(width: int, key: Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(16, 10, width, depth=3, key=key)


@jax.jit
def batch(step: int, seed: int) -> tuple[Array, Array]:
    x = jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), (64, 16))
    return x, jax.vmap(TEACHER)(x).argmax(axis=1)


def loss(model: eqx.nn.MLP, batch: tuple[Array, Array]) -> Array:
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


def roles() -> mup.Roles:
    return mup.infer(lambda width: make_model(width, jax.random.key(0)), BASE, {"width": 48}).at(width=WIDTHS[-1])


def check() -> mup.CoordinateReport:
    return mup.coord_check(make_model, loss, lambda seed: batch(0, seed), CHECKED, base=BASE, seeds=2)


def transfer() -> mup.TransferReport:
    unseen = [batch(step, 99) for step in range(8)]  # the same for all runs: their noise cancels where runs are compared
    runs = mup.sweep(make_model, loss, batch, WIDTHS, LRS, base=BASE, steps=150, seeds=(0, 1, 2), validation=unseen)
    return mup.transfer_report(runs, max_drift=1.0)


if __name__ == "__main__":
    print(roles().table(), check(), transfer(), sep="\n\n")
