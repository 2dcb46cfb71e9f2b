"""muP for a recurrent network: the next symbol of a Markov chain of order 2.

python docs/examples/gru.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mutransformer import mup

BASE, WIDTHS = {"width": 32}, [32, 128]
CHECKED = [32, 64, 128, 256]  # of the coordinate check
LRS = [2.0**i for i in range(-9, -3)]
SYMBOLS, LENGTH = 12, 16
# [SYMBOLS, SYMBOLS, SYMBOLS]: log probabilities of the next symbol by the two before it.
CHAIN = 3.0 * jax.random.normal(jax.random.key(99), (SYMBOLS,) * 3)


class Recurrent(eqx.Module):
    embedding: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, width: int, key: Array):
        a, b, c = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(SYMBOLS, width, key=a)
        self.cell = eqx.nn.GRUCell(width, width, key=b)
        self.head = eqx.nn.Linear(width, SYMBOLS, key=c)

    def __call__(self, symbols: Array) -> Array:
        """[T] -> logits [T, SYMBOLS] of the symbol that follows each."""

        def step(state: Array, x: Array) -> tuple[Array, Array]:
            state = self.cell(x, state)
            return state, state

        _, states = jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), jax.vmap(self.embedding)(symbols))
        return jax.vmap(self.head)(states)


@jax.jit
def batch(step: int, seed: int) -> Array:
    """Sequences [16, LENGTH + 1]."""
    start, *keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), LENGTH)
    first = jax.random.randint(start, (2, 16), 0, SYMBOLS)

    def draw(pair: Array, key: Array) -> tuple[Array, Array]:
        drawn = jax.random.categorical(key, CHAIN[pair[0], pair[1]])
        return jnp.stack([pair[1], drawn]), drawn

    _, rest = jax.lax.scan(draw, first, jnp.stack(keys))
    return jnp.concatenate([first, rest]).T


def loss(model: Recurrent, batch: Array) -> Array:
    logits = jax.vmap(model)(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def roles() -> mup.Roles:
    return mup.infer(lambda width: Recurrent(width, jax.random.key(0)), BASE, {"width": 48}).at(width=WIDTHS[-1])


def check() -> mup.CoordinateReport:
    return mup.coord_check(Recurrent, loss, lambda seed: batch(0, seed), CHECKED, base=BASE, seeds=2)


def transfer() -> mup.TransferReport:
    runs = mup.sweep(Recurrent, loss, batch, WIDTHS, LRS, base=BASE, steps=100, seeds=(0, 1))
    return mup.transfer_report(runs, max_drift=1.0)


if __name__ == "__main__":
    print(roles().table(), check(), transfer(), sep="\n\n")
