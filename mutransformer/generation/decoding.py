"""What the devices compute for sampling: a pass over the prompts, which fills a KV cache, and then tokens one after another."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from mutransformer.config.schema import SPLASH_MULTIPLE
from mutransformer.generation.sampling import Sampling, choose
from mutransformer.model.cached_attention import DecodeState, KVCache
from mutransformer.model.weights import Transformer
from mutransformer.sharding.mesh import n_row_groups, replicated
from mutransformer.training.program import Program

CHUNK = 16  # tokens of each text that are decoded before the host reads them; the first token is a chunk of its own
SHORTEST = 64  # positions of the shortest program that is compiled
NONE = -1  # in place of a token: the text has ended


class Request(NamedTuple):
    """A text to continue."""

    prompt: tuple[int, ...]
    number: int  # of this sample of the prompt: with the seed and the position it determines the draws
    end: int  # tokens at which the text ends, if not before


class Rows(NamedTuple):
    """The state of the texts that are decoded together, or its shardings. All but the cache is the same on every device."""

    cache: Any  # KVCache, valid before `positions`
    previous: Any  # int32 [B]: the token before the next one
    positions: Any  # int32 [B]: of the next token
    live: Any  # bool [B]: whether there is to be a next token


def padded_length(program: Program, n: int) -> int:
    """The positions of a program that holds n: a power of two, so that few programs are compiled, or the whole row.

    A softmax over more positions than are readable is the same; the other attention activations depend on their number.
    """
    T = program.config.data.seq_len
    if program.config.model.attention_activation != "softmax":
        return T
    least = SPLASH_MULTIPLE if program.execution.attention.startswith("splash") else SHORTEST
    return min(T, max(least, 1 << (n - 1).bit_length()))


def make_prefill(program: Program, context: int) -> Callable[..., KVCache]:
    """(weights, inputs [P, t] of prompts, prompt of each text [B]) -> the texts' KV cache, with room for `context` positions.

    The rows of inputs are divided among the groups of devices like the texts, whose prompts are counted within their group. A
    prompt of several texts is read once. Not jitted.
    """
    forward = program.forward
    # XLA:CPU would convert the whole cache to float32 for every token.
    dtype = jnp.float32 if program.execution.platform == "cpu" else forward.policy.compute

    def prefill(params: Transformer[Array], inputs: Int[Array, "p t"], prompt: Int[Array, " b"]) -> KVCache:
        room = ((0, 0), (0, 0), (0, 0), (0, context - inputs.shape[1]), (0, 0))
        cache = forward.prefill(params, inputs)
        return jax.tree.map(lambda a: jnp.pad(jnp.take(a, prompt, axis=1).astype(dtype), room), cache)

    rows = program.batch_pspec
    in_specs = forward.pspecs, PartitionSpec(*rows, None), rows
    return jax.shard_map(prefill, mesh=program.mesh, in_specs=in_specs, out_specs=_cache_pspecs(program))


def make_decode(program: Program) -> Callable[..., tuple[Float[Array, "B V"], KVCache]]:
    """(weights, cache, an input of each text, its position) -> logits over the padded vocabulary, and the cache with the inputs.

    The logits are float32, as in the loss. Not jitted.
    """
    forward = program.forward

    def decode(
        params: Transformer[Array], cache: KVCache, inputs: Int[Array, " b"], positions: Int[Array, " b"]
    ) -> tuple[Float[Array, "b v"], KVCache]:
        logits, new = forward.decode_step(params, inputs[:, None], DecodeState(cache, positions))
        return logits[:, 0], _insert(cache, new, positions)

    caches, rows = _cache_pspecs(program), program.batch_pspec
    in_specs, out_specs = (forward.pspecs, caches, rows, rows), (PartitionSpec(*rows, "y"), caches)
    return jax.shard_map(decode, mesh=program.mesh, in_specs=in_specs, out_specs=out_specs)


def _insert(cache: KVCache, new: KVCache, positions: Int[Array, " b"]) -> KVCache:
    """The cache with one position of each row replaced, row by row: in place, which a scatter is not on a CPU."""

    def row(i: Any, cache: KVCache) -> KVCache:
        def replaced(kept: Float[Array, "L b K T D"], new: Float[Array, "L b K 1 D"]) -> Array:
            one = lax.dynamic_slice_in_dim(new, i, 1, axis=1).astype(kept.dtype)
            return lax.dynamic_update_slice(kept, one, (0, i, 0, positions[i], 0))

        return jax.tree.map(replaced, cache, new)

    return lax.fori_loop(0, positions.size, row, cache)


def _cache_pspecs(program: Program) -> Any:
    """Of a cache [L B K T D]. Where y does not divide the key/value heads, K counts those that each of its devices reads."""
    pspec: Any = PartitionSpec(None, *program.batch_pspec, "y")
    return KVCache(pspec, pspec)


def make_advance(program: Program, sampling: Sampling) -> Callable[..., tuple[Int[Array, "B n"], Rows]]:
    """(weights, rows, number of each sample [B], its end [B], n) -> n tokens of each text, up to CHUNK, and the rows after them.

    A text ends at an eos, or where its end is; NONE stands for the tokens after it. The draws of a sample depend on the seed, its
    number and the position only: neither on other texts nor on the mesh. Not jitted.
    """
    (n_vocab, _, eos_id), decode = program.vocabulary, make_decode(program)

    def random_numbers(number: Int[Array, ""], position: Int[Array, ""]) -> Float[Array, " n"]:
        """The random numbers of a sample for CHUNK tokens, the first of which is at `position`."""
        key = jax.random.fold_in(jax.random.key(sampling.seed), number)
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, position + i)))(jnp.arange(CHUNK))

    def advance(
        params: Transformer[Array], rows: Rows, numbers: Int[Array, " B"], ends: Int[Array, " B"], n: Int[Array, ""]
    ) -> tuple[Int[Array, "B n"], Rows]:
        # For all tokens at once: drawn token by token they took a tenth of the time of 16 texts on a CPU.
        draws = jax.vmap(random_numbers)(numbers, rows.positions)

        def unfinished(carry: Any) -> Array:
            k, _, rows = carry
            return (k < n) & jnp.any(rows.live)

        def step(carry: Any) -> Any:
            k, tokens, (cache, previous, positions, live) = carry
            logits, cache = decode(params, cache, previous, positions)
            logits = jnp.where((jnp.arange(logits.shape[1]) < n_vocab)[None], logits, -jnp.inf)
            new = jax.vmap(partial(choose, sampling))(logits, draws[:, k])
            tokens = tokens.at[:, k].set(jnp.where(live, new, NONE))
            after = jnp.where(live, positions + 1, positions)
            rows = Rows(cache, jnp.where(live, new, previous), after, live & (new != eos_id) & (after < ends))
            return k + 1, tokens, rows

        tokens = jnp.full((len(numbers), CHUNK), NONE, jnp.int32)
        _, tokens, rows = lax.while_loop(unfinished, step, (jnp.int32(0), tokens, rows))
        return tokens, rows

    return advance


class Decoder:
    """Continues texts, all in one batch or in several of the same shape.

    Its two programs are compiled side by side from the start on, while the caller restores the weights.
    """

    def __init__(self, program: Program, sampling: Sampling, requests: Sequence[Request]) -> None:
        mesh, groups = program.mesh, n_row_groups(program.mesh)
        size = -(-min(sampling.batch, len(requests)) // groups) * groups
        self._batches = [requests[first : first + size] for first in range(0, len(requests), size)]
        self._size, self._per_group, self._bos_id = size, size // groups, program.bos_id
        self._n_prompts = max(len(part) for batch in self._batches for part in self._prompts(batch))  # of a group of devices
        self._length = padded_length(program, max(len(request.prompt) for request in requests))
        context = padded_length(program, max(request.end for request in requests))
        self._same, rows = replicated(mesh), NamedSharding(mesh, program.batch_pspec)
        caches = jax.tree.map(lambda pspec: NamedSharding(mesh, pspec), _cache_pspecs(program))

        def given(dtype: Any, *shape: int, sharding: NamedSharding = self._same) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        params, each = program.state.params, given(jnp.int32, size)
        prompts = given(jnp.int32, groups * self._n_prompts, self._length, sharding=rows)
        compiling = ThreadPoolExecutor()
        options = dict(program.execution.other_options)
        prefill = jax.jit(make_prefill(program, context), out_shardings=caches, compiler_options=options)
        lowered = prefill.lower(params, prompts, given(jnp.int32, size, sharding=rows))
        self._prefill = compiling.submit(lowered.compile)
        cache = jax.tree.map(lambda a, s: given(a.dtype, *a.shape, sharding=s), lowered.out_info, caches)
        state = Rows(cache, each, each, given(jnp.bool_, size))
        out_shardings = (self._same, Rows(caches, self._same, self._same, self._same))
        advance = make_advance(program, sampling)
        advance = jax.jit(advance, donate_argnums=1, out_shardings=out_shardings, compiler_options=options)
        self._advance = compiling.submit(advance.lower(params, state, each, each, given(jnp.int32)).compile)
        compiling.shutdown(wait=False)

    def decode(
        self, params: Transformer[Array], ended: Callable[[int], bool] = lambda text: False
    ) -> Iterator[tuple[int, Int[np.ndarray, "B n"]]]:
        """The index of a batch's first text, and new tokens of its texts, NONE behind a text's last one; until all have ended.

        The first token of each text is given as soon as it is known. ended: whether a text, by its index, has ended for another
        reason than an eos or its length; it is asked after each of these.
        """
        first = 0
        for batch in self._batches:
            padded = [*batch, *[batch[0]._replace(end=0)] * (self._size - len(batch))]
            prompts = [request.prompt for request in padded]
            numbers, ends = (np.array(column, np.int32) for column in zip(*((r.number, r.end) for r in padded), strict=True))
            previous = np.array([prompt[-1] if prompt else self._bos_id for prompt in prompts], np.int32)
            positions = np.array([len(prompt) for prompt in prompts], np.int32)
            live = positions < ends
            cache = self._prefill.result()(params, *self._prefill_arguments(padded))
            rows, n = Rows(cache, *map(self._put, (previous, positions, live))), 1
            while live.any():
                tokens, rows = self._advance.result()(params, rows, self._put(numbers), self._put(ends), np.int32(n))
                yield first, np.asarray(tokens)[: len(batch), :n]
                live = np.array(rows.live)
                live[: len(batch)] &= [not ended(first + i) for i in range(len(batch))]
                rows, n = rows._replace(live=self._put(live)), CHUNK
            first += len(batch)

    def _prompts(self, batch: Sequence[Request]) -> list[list[tuple[int, ...]]]:
        """The different prompts of the texts of each group of devices."""
        starts = range(0, len(batch), self._per_group)
        return [list(dict.fromkeys(request.prompt for request in batch[i : i + self._per_group])) for i in starts]

    def _prefill_arguments(self, batch: Sequence[Request]) -> tuple[Array, Array]:
        """The inputs of the prompts, behind bos, and which of its group's prompts each text continues."""
        inputs = np.zeros((len(batch) // self._per_group, self._n_prompts, self._length), np.int32)
        inputs[:, :, 0] = self._bos_id
        of_text = []
        for group, prompts in enumerate(self._prompts(batch)):
            for row, prompt in zip(inputs[group], prompts, strict=False):
                row[1 : len(prompt)] = prompt[:-1]
            of_text += [prompts.index(request.prompt) for request in batch[len(of_text) :][: self._per_group]]
        placed = self._prefill.result().input_shardings[0][1:]
        both = inputs.reshape(-1, self._length), np.array(of_text, np.int32)
        return tuple(jax.device_put(a, s) for a, s in zip(both, placed, strict=True))

    def _put(self, a: np.ndarray) -> Array:
        return jax.device_put(a, self._same)
