"""Text that a run's model continues: one pass over the prompt, then token by token beside a cache of keys and values."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from mutransformer.config.schema import Config, check
from mutransformer.data.tokenizers.registry import kept_tokenizer
from mutransformer.data.tokenizers.sentencepiece import Tokenizer
from mutransformer.model.attention import Cache, Past
from mutransformer.model.ops import shift_right
from mutransformer.model.transformer import Forward, Transformer
from mutransformer.sharding.mesh import AnyMesh, check_fits, make_mesh, replicated, rows
from mutransformer.training.checkpoint import Checkpoints
from mutransformer.training.state import plan

N_TOKENS = 200  # new ones, unless more are asked for

Prefill = Callable[[Transformer[Array], Int[Array, " T"]], Cache]
Decode = Callable[[Transformer[Array], Cache, Int[Array, " B"], Int[Array, ""]], tuple[Float[Array, "B V"], Cache]]


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    Raises:
        ConfigError: a number is out of range.
    """

    samples: int = 1
    tokens: int | None = None  # new ones, at most; None: N_TOKENS or what fits
    temperature: float = 0.8  # logits are divided by it; 0: the most probable token, always
    top_k: int = 0  # only so many of the most probable tokens are drawn from; 0: all
    top_p: float = 1.0  # only the fewest of the most probable tokens that have this probability together
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.samples >= 1, f"samples = {self.samples}: must be at least 1")
        check(self.tokens is None or self.tokens >= 1, f"tokens = {self.tokens}: must be at least 1")
        plain = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6  # beyond, float32 logits would lose what they say
        check(plain, f"temperature = {self.temperature}: must be 0, or lie in 1e-6 ... 1e6")
        check(self.top_k >= 0, f"top_k = {self.top_k}: must not be negative; 0 is all")
        check(0 < self.top_p <= 1, f"top_p = {self.top_p}: must lie above 0, and at most at 1")
        check(0 <= self.seed < 2**31, f"seed = {self.seed}: must lie in 0 ... 2^31 - 1")


def generate(config: Config, prompt: str, how: Sampling) -> dict[str, Any]:
    """Continues a prompt by a run's model, as eval.checkpoint says. Reads the run's folder only, none of its data.

    Args:
        config: the resolved config of the run, which names its folder.
        prompt: may be empty: the text then begins with its first token.
        how: to sample.

    Returns:
        run, step, prompt; and samples: of each its text and tokens without the prompt and the eos, and whether an eos ended it.

    Raises:
        ConfigError: the run or its checkpoint is not there or does not fit the config; the text does not fit data.seq_len.
    """
    mesh = make_mesh(config.mesh)
    tokenizer = kept_tokenizer(config.data, config.rundir)
    config = config.with_vocab(tokenizer.n_vocab)
    check_fits(config, mesh)
    given, T = prompt_tokens(prompt, tokenizer, config), config.data.seq_len
    left = T - len(given)
    check(left >= 1, f"the prompt has {len(given)} tokens: data.seq_len = {T} leaves none to add")
    check(how.tokens is None or how.tokens <= left, f"tokens = {how.tokens}: data.seq_len = {T} leaves {left} behind the prompt")
    step, params = restored(config, mesh, tokenizer)
    row = np.zeros(T, np.int32)
    row[: len(given)] = given
    last = len(given) + (how.tokens or min(N_TOKENS, left))
    sampler = make_sampler(config, mesh, how, tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_vocab)
    texts = np.asarray(sampler(params, row, np.int32(len(given)), np.int32(last)))
    samples = [continuation(given, text[len(given) : last].tolist(), tokenizer) for text in texts]
    return {"run": str(config.rundir), "step": step, "prompt": prompt, "samples": samples}


def continuation(given: list[int], new: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Of the tokens behind a prompt's: text and tokens up to the first eos, and whether there is one."""
    ended = tokenizer.eos_id in new
    tokens = new[: new.index(tokenizer.eos_id)] if ended else new
    # Some tokenizers drop a space in front of the first token that they decode: the prompt's must stand before it.
    head, whole = tokenizer.decode(given), tokenizer.decode([*given, *tokens])
    text = whole[len(head) :] if whole.startswith(head) else tokenizer.decode(tokens)
    return {"text": text, "tokens": tokens, "ended": ended}


def prompt_tokens(prompt: str, tokenizer: Tokenizer, config: Config) -> list[int]:
    """The ids of a prompt, as a document of the run's data begins.

    Raises:
        ConfigError: it is no text, as an argument of a command may be.
    """
    check(not any("\ud800" <= c <= "\udfff" for c in prompt), "the prompt is not UTF-8")
    begin = [tokenizer.bos_id] if config.data.add_bos else []
    return [*begin, *tokenizer.encode([prompt])[0].tolist()]


def restored(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> tuple[int, Transformer[Array]]:
    """The step and the weights of the checkpoint that eval.checkpoint names.

    Raises:
        ConfigError: there is none, or it is of another model or tokenizer.
    """
    # Which tokens it was trained on does not matter here, and to tell they would all have to be read.
    free = replace(config.checkpoint, allow=[*config.checkpoint.allow, "fingerprint.tokens"])
    with closing(Checkpoints(replace(config, checkpoint=free), read_only=True)) as checkpoints:
        step = checkpoints.chosen()
        checkpoints.check_same(step, {"tokens": None, "tokenizer": tokenizer.fingerprint})
        state, _ = checkpoints.restore(step, plan(config, mesh).shapes)
    return step, state.params


def make_prefill(config: Config, mesh: AnyMesh, B: int) -> Prefill:
    """(weights, inputs of a row) -> its cache, for each of B samples. Not jitted."""
    forward = Forward(config, cache=True)
    b = B // (mesh.shape["x"] * mesh.shape.get("z", 1))

    def prefill(params: Transformer[Array], inputs: Int[Array, " T"]) -> Cache:
        cache = forward.read(params, inputs[None])[1]
        return jax.tree.map(lambda a: jnp.repeat(a, b, axis=1), cache)  # all samples begin alike: a device reads the row once

    return jax.shard_map(prefill, mesh=mesh, in_specs=(forward.pspecs, PartitionSpec()), out_specs=_places(mesh))


def make_decode(config: Config, mesh: AnyMesh) -> Decode:
    """(weights, cache, an input of each sample, its position) -> logits over the padded vocabulary, and the cache with the
    position added. The logits are float32, as the loss reads them. Not jitted."""
    forward = Forward(config, cache=True)

    def decode(
        params: Transformer[Array], cache: Cache, inputs: Int[Array, " b"], position: Int[Array, ""]
    ) -> tuple[Float[Array, "b v"], Cache]:
        x, new = forward.read(params, inputs[:, None], Past(cache, position))
        logits = forward.unembed(params, forward.unembed_input(params, x).astype(jnp.float32))
        added = jax.tree.map(lambda a, n: lax.dynamic_update_slice_in_dim(a, n, position, axis=3), cache, new)
        return logits[:, 0], added

    caches = _places(mesh)
    return jax.shard_map(
        decode,
        mesh=mesh,
        in_specs=(forward.pspecs, caches, rows(mesh), PartitionSpec()),
        out_specs=(PartitionSpec(*rows(mesh), "y"), caches),
    )


def _places(mesh: AnyMesh) -> Any:
    """Of a cache [L B K T D]. Where y does not divide the heads, K counts those that each of its devices reads."""
    place: Any = PartitionSpec(None, *rows(mesh), "y")
    return Cache(place, place)


def make_sampler(config: Config, mesh: Mesh, how: Sampling, bos_id: int, eos_id: int, n_vocab: int) -> Callable[..., Array]:
    """The jitted sampler: (weights, a row [T] that begins with the prompt, the prompt's number of tokens, that at which it is to
    end) -> rows [samples, T]: the prompt, what was sampled, then nothing that counts.

    A sample ends at an eos as well. Its draws depend on seed, its number and the position only: neither on the number of samples
    nor on the mesh. It is compiled once, for all prompts.

    Args:
        config: of the run.
        mesh: of the weights.
        how: to sample; its `tokens` is not read.
        bos_id: what stands before the row.
        eos_id: of the tokenizer.
        n_vocab: the tokenizer's ids; no other is drawn.
    """
    each = mesh.shape["x"] * mesh.shape.get("z", 1)
    B = -(-how.samples // each) * each
    prefill, decode = make_prefill(config, mesh, B), make_decode(config, mesh)

    def sample(params: Transformer[Array], row: Int[Array, " T"], first: Int[Array, ""], last: Int[Array, ""]) -> Array:
        number = jnp.arange(B)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(how.seed), number)

        def goes_on(carry: Any) -> Array:
            _, t, ended, _ = carry
            return (t < last) & ~jnp.all(ended)

        def step(carry: Any) -> Any:
            tokens, t, ended, cache = carry
            before = jnp.where(t == 0, bos_id, tokens[:, t - 1])
            logits, cache = decode(params, cache, before, t)
            logits = jnp.where((jnp.arange(logits.shape[1]) < n_vocab)[None], logits, -jnp.inf)
            new = jax.vmap(lambda logits, key: choose(logits, jax.random.fold_in(key, t), how))(logits, keys)
            return tokens.at[:, t].set(new), t + 1, ended | (new == eos_id), cache

        cache = prefill(params, shift_right(row[None], bos_id)[0])
        start = jnp.broadcast_to(row, (B, row.size)), first, number >= how.samples, cache
        return lax.while_loop(goes_on, step, start)[0][: how.samples]

    return jax.jit(sample, out_shardings=replicated(mesh))


def choose(logits: Float[Array, " V"], key: Array, how: Sampling) -> Int[Array, ""]:
    """The next token."""
    if how.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    return jax.random.categorical(key, likely(logits / how.temperature, how.top_k, how.top_p)).astype(jnp.int32)


def likely(logits: Float[Array, " V"], top_k: int, top_p: float) -> Float[Array, " V"]:
    """The logits of those that may be drawn, -inf elsewhere: the top_k most probable, or all if it is 0; and of them, with
    probabilities that add up to one again, the fewest that have at least top_p together (Holtzman et al., arXiv 1904.09751)."""
    k = min(top_k or logits.size, logits.size)
    if k == logits.size and top_p == 1:
        return logits
    top, ids = lax.top_k(logits, k)
    if top_p < 1:
        share = jax.nn.softmax(top)
        top = jnp.where(jnp.cumsum(share) - share < top_p, top, -jnp.inf)
    return jnp.full_like(logits, -jnp.inf).at[ids].set(top)
