"""How a text is continued: the settings of sampling, and the choice of one token from its logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from mutransformer.errors import check

N_TOKENS = 200  # new tokens, unless more are asked for


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


def choose(logits: Float[Array, " V"], key: Array, sampling: Sampling) -> Int[Array, ""]:
    """The next token."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    kept = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.random.categorical(key, kept).astype(jnp.int32)


def filter_logits(logits: Float[Array, " V"], top_k: int, top_p: float) -> Float[Array, " V"]:
    """The logits of the tokens that may be drawn, -inf elsewhere.

    These are the top_k most probable tokens (all, if it is 0); and of them, with probabilities renormalized, the fewest that
    together have a probability of at least top_p (Holtzman et al., arXiv 1904.09751).
    """
    k = min(top_k or logits.size, logits.size)
    if k == logits.size and top_p == 1:
        return logits
    top, ids = lax.top_k(logits, k)
    if top_p < 1:
        probability = jax.nn.softmax(top)
        top = jnp.where(jnp.cumsum(probability) - probability < top_p, top, -jnp.inf)
    return jnp.full_like(logits, -jnp.inf).at[ids].set(top)
