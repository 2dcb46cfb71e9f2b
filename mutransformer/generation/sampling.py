"""How a text is continued: the settings of sampling, and the choice of one token from its logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from mutransformer.errors import check

N_TOKENS = 200  # new tokens, unless more are asked for
BLOCK = 128  # weights whose sum is taken first, to draw one


@dataclass(frozen=True)
class Sampling:
    """How prompts are continued. Raises ConfigError if a number is out of range, or a stop string is empty."""

    samples: int = 1  # continuations to draw of each prompt
    tokens: int | None = None  # new tokens at most; None: N_TOKENS, or as many as data.seq_len leaves
    temperature: float = 0.8  # logits are divided by it; 0: always the most probable token
    top_k: int = 0  # draw from this many of the most probable tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest of the most probable tokens that together have this probability
    seed: int = 0  # of the draws
    stop: tuple[str, ...] = ()  # a text ends before the first of these strings
    batch: int = 32  # texts decoded at a time, which bounds memory and changes no text

    def __post_init__(self) -> None:
        check(self.samples >= 1, f"samples = {self.samples}: must be at least 1")
        check(self.tokens is None or self.tokens >= 1, f"tokens = {self.tokens}: must be at least 1")
        in_range = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6  # beyond, float32 logits lose their differences
        check(in_range, f"temperature = {self.temperature}: must be 0, or lie in 1e-6 ... 1e6")
        check(self.top_k >= 0, f"top_k = {self.top_k}: must not be negative; 0 is all")
        check(0 < self.top_p <= 1, f"top_p = {self.top_p}: must be above 0, and at most 1")
        check(0 <= self.seed < 2**31, f"seed = {self.seed}: must lie in 0 ... 2^31 - 1")
        check(all(self.stop), "stop: a stop string must not be empty")
        check(self.batch >= 1, f"batch = {self.batch}: must be at least 1")


def choose(sampling: Sampling, logits: Float[Array, " V"], u: Float[Array, ""]) -> Int[Array, ""]:
    """The next token. u: uniform in 0 ... 1."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    kept = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return draw(jnp.exp(kept - jnp.max(kept)), u)


def filter_logits(logits: Float[Array, " V"], top_k: int, top_p: float) -> Float[Array, " V"]:
    """The logits of the tokens that may be drawn, -inf elsewhere.

    These are the top_k most probable tokens (all, if it is 0); and of them, with probabilities renormalized, the fewest that
    together have a probability of at least top_p (Holtzman et al., arXiv 1904.09751). Of equals the first ones count as more
    probable.
    """
    k = min(top_k or logits.size, logits.size)
    if k == logits.size:
        return logits if top_p == 1 else _nucleus(logits, top_p)
    top, ids = lax.top_k(logits, k)
    if top_p < 1:
        probability = jax.nn.softmax(top)
        top = jnp.where(jnp.cumsum(probability) - probability < top_p, top, -jnp.inf)
    return jnp.full_like(logits, -jnp.inf).at[ids].set(top)


def _nucleus(logits: Float[Array, " V"], top_p: float) -> Float[Array, " V"]:
    """`filter_logits` by top_p alone. It searches for the smallest logit of the set, bit by bit: on a CPU that takes a tenth of
    the time that sorting takes."""
    probability = jax.nn.softmax(logits)
    bits = lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits < sign, bits | sign, ~bits)  # integers in the order of the logits

    def next_bit(i: Array, least: Array) -> Array:
        higher = least | (sign >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(jnp.where(order >= higher, probability, 0)) >= top_p, higher, least)

    least = lax.fori_loop(0, 32, next_bit, jnp.uint32(0))  # the largest one from which on the sum is at least top_p
    above, equal = order > least, jnp.where(order == least, probability, 0)
    before = jnp.sum(jnp.where(above, probability, 0)) + jnp.cumsum(equal) - equal
    return jnp.where(above | ((order == least) & (before < top_p)), logits, -jnp.inf)


def draw(weights: Float[Array, " V"], u: Float[Array, ""]) -> Int[Array, ""]:
    """An index, with probability weights / sum(weights), for a u that is uniform in 0 ... 1: where the cumulative sum passes
    u * sum(weights). Never one of weight 0.

    The block is found first, and then the index within it. One random number takes a tenth of the time of one for each weight,
    which the Gumbel-max trick needs.
    """
    blocks = jnp.pad(weights, (0, -weights.size % BLOCK)).reshape(-1, BLOCK)
    sums = jnp.sum(blocks, axis=1)
    x = u * jnp.sum(sums)
    block, before = _passes(sums, x)
    # Not blocks[block]: XLA:CPU makes a loop over the texts of it.
    within = jnp.sum(jnp.where(jnp.arange(len(blocks))[:, None] == block, blocks, 0), axis=0)
    index, _ = _passes(within, x - before)
    return jnp.minimum(BLOCK * block + index, weights.size - 1).astype(jnp.int32)


def _passes(weights: Float[Array, " n"], x: Float[Array, ""]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The first index of positive weight at which the cumulative sum is above x, and the sum before it. If rounding leaves none,
    the last index of positive weight."""
    at, positive = jnp.arange(weights.size), weights > 0
    ends = jnp.cumsum(weights)
    last = jnp.max(jnp.where(positive, ends, 0))
    index = jnp.min(jnp.where(positive & ((ends > x) | (ends >= last)), at, weights.size - 1))
    return index, jnp.max(jnp.where(at < index, ends, 0))
