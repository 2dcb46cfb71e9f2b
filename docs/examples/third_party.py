"""muP for a model of another package, as it is: a coupling flow of FlowJAX (pip install flowjax), fitted to a distribution.

Four of its eight coordinates are a teacher network of the others, and noise. The flow's layers are stacked in one array each, for
a scan: the leading dim does not grow with width.

python docs/examples/third_party.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from flowjax.distributions import Normal, Transformed
from flowjax.flows import coupling_flow
from jax import Array

from mutransformer import mup

BASE, WIDTHS = {"nn_width": 32}, [32, 128]
CHECKED = [32, 64, 128, 256]  # of the coordinate check
LRS = [2.0**i for i in range(-11, -3)]
DIM = 8
TEACHER = eqx.nn.MLP(DIM // 2, DIM // 2, 64, 2, activation=jnp.tanh, key=jax.random.key(99))


def make_model(nn_width: int, key: Array) -> Transformed:
    return coupling_flow(key, base_dist=Normal(jnp.zeros(DIM)), flow_layers=4, nn_width=nn_width, nn_depth=2)


@jax.jit
def batch(step: int, seed: int) -> Array:
    """Points [64, DIM]."""
    a, b = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    x = jax.random.normal(a, (64, DIM // 2))
    y = 4 * jax.vmap(TEACHER)(2 * x) + 0.2 * jax.random.normal(b, x.shape)
    return jnp.concatenate([x, y], axis=1)


def loss(model: Transformed, batch: Array) -> Array:
    return -paramax.unwrap(model).log_prob(batch).mean()


def roles() -> mup.Roles:
    make = lambda nn_width: make_model(nn_width, jax.random.key(0))  # noqa: E731
    return mup.infer(make, BASE, {"nn_width": 48}).at(nn_width=WIDTHS[-1])


def check() -> mup.CoordinateReport:
    return mup.coord_check(make_model, loss, lambda seed: batch(0, seed), CHECKED, base=BASE, seeds=2)


def transfer() -> mup.TransferReport:
    runs = mup.sweep(make_model, loss, batch, WIDTHS, LRS, base=BASE, steps=200, seeds=(0, 1))
    return mup.transfer_report(runs, max_drift=1.0)


if __name__ == "__main__":
    print(roles().table(), check(), transfer(), sep="\n\n")
