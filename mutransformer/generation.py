"""Sampling: continues a prompt, by one pass over the prompt and then token by token with a KV cache."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from mutransformer.config.schema import Config
from mutransformer.data.tokenizers.registry import saved_tokenizer
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import check
from mutransformer.model.attention import DecodeState, KVCache
from mutransformer.model.ops import shift_right
from mutransformer.model.weights import Transformer
from mutransformer.sharding.mesh import n_row_groups, replicated
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.program import Program, build
from mutransformer.training.run_folder import RunFolder
from mutransformer.training.url_folder import readable

N_TOKENS = 200  # new tokens, unless more are asked for


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued. Raises ConfigError if a number is out of range."""

    samples: int = 1  # continuations to draw
    tokens: int | None = None  # new tokens at most; None: N_TOKENS, or as many as data.seq_len leaves
    temperature: float = 0.8  # logits are divided by it; 0: always the most probable token
    top_k: int = 0  # draw from this many of the most probable tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest of the most probable tokens that together have this probability
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        check(self.samples >= 1, f"samples = {self.samples}: must be at least 1")
        check(self.tokens is None or self.tokens >= 1, f"tokens = {self.tokens}: must be at least 1")
        in_range = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6  # beyond, float32 logits lose their differences
        check(in_range, f"temperature = {self.temperature}: must be 0, or lie in 1e-6 ... 1e6")
        check(self.top_k >= 0, f"top_k = {self.top_k}: must not be negative; 0 is all")
        check(0 < self.top_p <= 1, f"top_p = {self.top_p}: must be above 0, and at most 1")
        check(0 <= self.seed < 2**31, f"seed = {self.seed}: must lie in 0 ... 2^31 - 1")


def generate(config: Config, prompt: str, sampling: Sampling) -> dict[str, Any]:
    """Continues a prompt, which may be empty, with a run's model at the checkpoint that eval.checkpoint names.

    Reads the run's folder only. Returns run, step, prompt, and samples: for each its text and tokens without prompt and eos, and
    whether an eos ended it.

    Raises:
        ConfigError: the run or its checkpoint is missing or does not fit the config; the text does not fit data.seq_len.
    """
    with readable(config) as folder:
        tokenizer = saved_tokenizer(config.data, folder.path)
        program = build(config, vocabulary=tokenizer)
        step, params = restore_params(program, tokenizer, folder)
    prefix, T = prompt_tokens(prompt, tokenizer, config), config.data.seq_len
    n, room = len(prefix), T - len(prefix)
    check(room >= 1, f"the prompt has {n} tokens: data.seq_len = {T} leaves none to add")
    new = sampling.tokens
    check(new is None or new <= room, f"tokens = {new}: data.seq_len = {T} leaves {room} after the prompt")
    row = np.zeros(T, np.int32)
    row[:n] = prefix
    end = n + (new or min(N_TOKENS, room))
    rows = np.asarray(make_sampler(program, sampling)(params, row, np.int32(n), np.int32(end)))
    samples = [continuation(prefix, row[n:end].tolist(), tokenizer) for row in rows]
    return {"run": folder.name, "step": step, "prompt": prompt, "samples": samples}


def continuation(prefix: list[int], new: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Text and tokens of a continuation up to its first eos, and whether there is one."""
    ended = tokenizer.eos_id in new
    tokens = new[: new.index(tokenizer.eos_id)] if ended else new
    # Some tokenizers drop a space in front of the first token that they decode: decode the prompt's tokens too.
    head, full = tokenizer.decode(prefix), tokenizer.decode([*prefix, *tokens])
    text = full[len(head) :] if full.startswith(head) else tokenizer.decode(tokens)
    return {"text": text, "tokens": tokens, "ended": ended}


def prompt_tokens(prompt: str, tokenizer: Tokenizer, config: Config) -> list[int]:
    """The ids of a prompt, tokenized as the beginning of a document of the run's data.

    Raises ConfigError if it is not valid Unicode, as an argument of a command may be.
    """
    check(not any("\ud800" <= c <= "\udfff" for c in prompt), "the prompt is not UTF-8")
    bos = [tokenizer.bos_id] if config.data.add_bos else []
    return [*bos, *tokenizer.encode([prompt])[0].tolist()]


def restore_params(program: Program, tokenizer: Tokenizer, folder: RunFolder) -> tuple[int, Transformer[Array]]:
    """The step and the weights of the checkpoint that eval.checkpoint names.

    Raises ConfigError if there is none, or if it belongs to another model or tokenizer.
    """
    # The training tokens do not matter here, and their fingerprint would require reading them all.
    config = program.config
    allow = replace(config.checkpoint, allow=[*config.checkpoint.allow, "fingerprint.tokens"])
    with closing(Checkpoints(replace(config, checkpoint=allow), folder, read_only=True)) as checkpoints:
        step = checkpoints.chosen(program.state)
        checkpoints.check_same(step, {"tokens": None, "tokenizer": tokenizer.fingerprint})
        state, _ = checkpoints.restore(step, program.state)
    return step, state.params


def make_prefill(program: Program, B: int) -> Callable[..., KVCache]:
    """(weights, inputs of one row) -> its KV cache, repeated for each of B samples. Not jitted."""
    forward, repeats = program.forward, B // n_row_groups(program.mesh)

    def prefill(params: Transformer[Array], inputs: Int[Array, " T"]) -> KVCache:
        cache = forward.prefill(params, inputs[None])
        return jax.tree.map(lambda a: jnp.repeat(a, repeats, axis=1), cache)  # all samples share the prompt: it is read once

    return jax.shard_map(prefill, mesh=program.mesh, in_specs=(forward.pspecs, PartitionSpec()), out_specs=_cache_pspecs(program))


def make_decode(program: Program) -> Callable[..., tuple[Float[Array, "B V"], KVCache]]:
    """(weights, cache, an input of each sample, its position) -> logits over the padded vocabulary, and the cache with the
    position added. The logits are float32, as in the loss. Not jitted."""
    forward = program.forward

    def decode(
        params: Transformer[Array], cache: KVCache, inputs: Int[Array, " b"], position: Int[Array, ""]
    ) -> tuple[Float[Array, "b v"], KVCache]:
        logits, new = forward.decode_step(params, inputs[:, None], DecodeState(cache, position))
        updated = jax.tree.map(lambda a, n: lax.dynamic_update_slice_in_dim(a, n, position, axis=3), cache, new)
        return logits[:, 0], updated

    caches, rows = _cache_pspecs(program), program.batch_pspec
    in_specs, out_specs = (forward.pspecs, caches, rows, PartitionSpec()), (PartitionSpec(*rows, "y"), caches)
    return jax.shard_map(decode, mesh=program.mesh, in_specs=in_specs, out_specs=out_specs)


def _cache_pspecs(program: Program) -> Any:
    """Of a cache [L B K T D]. Where y does not divide the key/value heads, K counts those that each of its devices reads."""
    pspec: Any = PartitionSpec(None, *program.batch_pspec, "y")
    return KVCache(pspec, pspec)


def make_sampler(program: Program, sampling: Sampling) -> Callable[..., Array]:
    """The jitted sampler, a function of (weights, row [T] that begins with the prompt, tokens of the prompt, tokens at which to
    end) -> rows [samples, T]: the prompt, the sampled tokens, then padding.

    A sample also ends at an eos. Its draws depend on the seed, its number and the position only: neither on the number of samples
    nor on the mesh. It is compiled once for all prompts. sampling.tokens is not read.
    """
    n_groups, (n_vocab, bos_id, eos_id) = n_row_groups(program.mesh), program.vocabulary
    B = -(-sampling.samples // n_groups) * n_groups
    prefill, decode = make_prefill(program, B), make_decode(program)

    def sample(params: Transformer[Array], row: Int[Array, " T"], first: Int[Array, ""], last: Int[Array, ""]) -> Array:
        number = jnp.arange(B)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), number)

        def unfinished(carry: Any) -> Array:
            _, t, ended, _ = carry
            return (t < last) & ~jnp.all(ended)

        def step(carry: Any) -> Any:
            tokens, t, ended, cache = carry
            previous = jnp.where(t == 0, bos_id, tokens[:, t - 1])
            logits, cache = decode(params, cache, previous, t)
            logits = jnp.where((jnp.arange(logits.shape[1]) < n_vocab)[None], logits, -jnp.inf)
            new = jax.vmap(lambda logits, key: choose(logits, jax.random.fold_in(key, t), sampling))(logits, keys)
            return tokens.at[:, t].set(new), t + 1, ended | (new == eos_id), cache

        cache = prefill(params, shift_right(row[None], bos_id)[0])
        start = jnp.broadcast_to(row, (B, row.size)), first, number >= sampling.samples, cache
        return lax.while_loop(unfinished, step, start)[0][: sampling.samples]

    return jax.jit(sample, out_shardings=replicated(program.mesh))


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
