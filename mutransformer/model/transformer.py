"""The mathematics of the Transformer: what it computes with its weights on one device of the mesh.

Dims and their shards are those of `sharding.spec`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from mutransformer.config.schema import ModelConfig
from mutransformer.model import ops
from mutransformer.model.attention import attention, attention_logits, attention_mean_square
from mutransformer.model.cached_attention import DecodeState, KVCache, decode_attention
from mutransformer.model.execution import Execution
from mutransformer.model.loss import Head, head_loss, mean_square_of_logits, target_losses
from mutransformer.model.matmul import MatmulPolicy, gather_matrix, look_up, project
from mutransformer.model.ops import Segments
from mutransformer.model.weights import Block, Transformer
from mutransformer.sharding.collectives import gather_heads, gather_x, gather_y, scatter_y
from mutransformer.sharding.spec import Weight

Params = Transformer[Array]
Tokens = Int[Array, "b T"]
Stream = Float[Array, "b T m"]  # the residual stream
Intermediates = dict[str, Array]
Keep = Callable[[Intermediates], Any]  # what of a layer's intermediates to return


@dataclass(frozen=True)
class Forward:
    """The mathematics of a model, for use inside shard_map on this device's shards.

    The multipliers are the factors on the embedding, on residual branches and on logits: muP's forward multipliers, times those
    of the config. There is one for each weight.
    """

    c: ModelConfig
    specs: Transformer[Weight]
    block_specs: Block[Weight]  # of one layer
    multipliers: Transformer[float]
    policy: MatmulPolicy
    execution: Execution
    z_loss: float = 0.0

    @property
    def pspecs(self) -> Transformer[Any]:
        return jax.tree.map(lambda w: w.pspec, self.specs)

    def for_gathered_weights(self) -> "Forward":
        """The same mathematics for weights that are gathered over x already, whose gradients stay this device's own, in float32;
        see `gather_weights`."""
        specs, block_specs = (jax.tree.map(lambda w: w.off("x"), tree) for tree in (self.specs, self.block_specs))
        policy = self.policy._replace(grad_reduce_dtype="float32")
        return replace(self, specs=specs, block_specs=block_specs, policy=policy)

    def gather_weights(self, params: Params) -> Params:
        """All weights gathered over x, rounded to the compute dtype but typed float32. Gradient: reduce-scattered over x."""
        return jax.tree.map(partial(self.gather_vector, typed=jnp.float32), params, self.specs)

    def apply_layers(
        self, params: Params, inputs: Tokens, segments: Segments, keep: Keep | None = None, past: DecodeState | None = None
    ) -> tuple[Stream, Any]:
        """The residual stream after the last layer, and what `keep` selects of `intermediates`, stacked over layers.

        With `past`, for decoding, the inputs are one token each, at past.positions.
        """
        s = self.specs
        table = self.gather_vector(params.embed, s.embed, typed=jnp.float32)
        x = look_up(table, inputs, self.policy.compute)
        if self.c.embed_norm:
            x = self.norm(x, self.gather(params.embed_norm, s.embed_norm))
        x = _times(x, self.multipliers.embed)

        def layer(xs: tuple[Array, ...], of_layer: tuple[Block[Array], Any]) -> tuple[tuple[Array, ...], Any]:
            block, i = of_layer
            w = jax.tree.map(self.gather, block, self.block_specs)
            layer_past = None if past is None else past._replace(layer=i)
            done = [self.layer(w, x, rows, layer_past) for x, rows in zip(xs, groups, strict=True)]
            return tuple(x for x, _ in done), None if keep is None else keep(done[0][1])

        n = self.execution.overlap_groups
        n = n if keep is None and inputs.shape[0] % n == 0 else 1
        groups = jnp.split(segments, n) if segments is not None else [None] * n
        layer, xs = self.execution.rematerialize(layer), tuple(jnp.split(x, n))
        if self.execution.unroll_layers and keep is None and past is None:
            for block in _unstacked(params.blocks):
                xs, _ = layer(xs, (block, None))
            return jnp.concatenate(xs), None
        scanned = params.blocks, None if past is None else jnp.arange(past.cache.k.shape[0])
        xs, kept = lax.scan(layer, xs, scanned)
        return jnp.concatenate(xs), kept

    def layer(self, w: "Block[Any]", x: Stream, segments: Segments, past: DecodeState | None) -> tuple[Stream, Intermediates]:
        seen = {"residual": x}
        branch, in_attention = self.attention(w, x, segments, past)
        x = checkpoint_name(x + _times(branch, self.multipliers.blocks.w_o), "middle")
        branch, in_mlp = self.mlp(w, x)
        x = x + _times(branch, self.multipliers.blocks.w_down)
        return x, seen | in_attention | in_mlp

    def attention(self, w: "Block[Any]", x: Stream, segments: Segments, past: DecodeState | None) -> tuple[Stream, Intermediates]:
        c, s = self.c, self.block_specs
        h = self.gather_y(self.norm(x, w.attn_norm))
        q = _plus(project(h, w.w_q, s.w_q, self.policy), w.b_q)
        k = _plus(project(h, w.w_k, s.w_k, self.policy), w.b_k)
        v = _plus(project(h, w.w_v, s.w_v, self.policy), w.b_v)
        if s.w_k.dims[-1].axis == "y":
            k, v = (ops.select_kv(gather_heads(z), q.shape[2], c.n_head) for z in (k, v))
        seen = {"query": q, "key": k, "value": v}
        if c.qk_norm:
            q, k = (_gained(ops.rms_norm(z, c.norm_eps), g) for z, g in ((q, w.q_norm), (k, w.k_norm)))
        if c.rotary_base:
            where = (None, None) if past is None else (past.positions[:, None], past.cache.k.shape[3])
            q, k = (ops.rotary(z, c.rotary_base, *where) for z in (q, k))
        settings = c.logit_scale, c.attention_activation, c.norm_eps
        if past is None:
            with jax.named_scope("attention"):  # by which profilers, and `benchmark --report`, know its operations
                o = attention(q, k, v, *settings, segments, self.execution.attention)
        else:
            o = decode_attention(q, k, v, past, *settings, self.execution.cache_lengths)
        r = _plus(self.scatter_y(project(o, w.w_o, s.w_o, self.policy)), w.b_o)
        return r, seen | {"rotated_query": q, "rotated_key": k, "attention_output": o, "attention_branch": r}

    def mlp(self, w: "Block[Any]", x: Stream) -> tuple[Stream, Intermediates]:
        c, s = self.c, self.block_specs
        h = self.gather_y(self.norm(x, w.mlp_norm))
        up = f = checkpoint_name(_plus(project(h, w.w_up, s.w_up, self.policy), w.b_up), "hidden")
        if w.w_gate is None or s.w_gate is None:
            f = ops.ACTIVATIONS[c.activation](f)
        else:
            gate = checkpoint_name(_plus(project(h, w.w_gate, s.w_gate, self.policy), w.b_gate), "gate")
            f = ops.ACTIVATIONS[c.activation](gate) * f
        r = _plus(self.scatter_y(project(f, w.w_down, s.w_down, self.policy)), w.b_down)
        return r, {"feed_forward_hidden": up, "feed_forward_activation": f, "feed_forward_branch": r}

    def final_hidden(self, params: Params, x: Stream) -> Float[Array, "b T M"]:
        """The normed residual stream that the unembedding reads, gathered over y."""
        x = self.gather_y(self.norm(x, self.gather(params.final_norm, self.specs.final_norm)))
        return _times(x, self.multipliers.unembed)

    def unembed(self, params: Params, h: Float[Array, "b T M"]) -> Float[Array, "b T v"]:
        """Logits: this device's slice of the padded vocabulary."""
        s = self.specs
        logits = project(h, self.gather(params.unembed, s.unembed), s.unembed, self.policy)
        return _plus(logits, self.gather(params.b_unembed, s.b_unembed))

    def logits(self, params: Params, inputs: Tokens, segments: Segments) -> Float[Array, "b T v"]:
        """This device's slice of the padded vocabulary."""
        x, _ = self.apply_layers(params, inputs, segments)
        return self.unembed(params, self.final_hidden(params, x))

    def prefill(self, params: Params, inputs: Tokens) -> KVCache:
        """Keys and values of the inputs, stacked over layers."""
        return self.apply_layers(params, inputs, None, keep=_kv)[1]

    def decode_step(self, params: Params, inputs: Int[Array, "b 1"], past: DecodeState) -> tuple[Float[Array, "b T v"], KVCache]:
        """float32 logits after one token at past.positions, and the token's keys and values [L b k 1 D]."""
        x, new = self.apply_layers(params, inputs, None, keep=_kv, past=past)
        return self.unembed(params, self.final_hidden(params, x).astype(jnp.float32)), new

    def intermediates(self, params: Params, inputs: Tokens, segments: Segments) -> Intermediates:
        """The activations of the model by name, on this device; those of the layers are stacked over them in dim 0.

        residual: the input of each layer. query, key, value: projections; rotated_...: as attention takes them. attention_logits:
        of the pairs that the causal mask allows, even of two segments. attention_output: before w_o; ..._branch: added to the
        residual stream, before its multiplier. feed_forward_hidden, ..._activation: before and after the activation. final: the
        residual stream after the last layer. logits: over the padded vocabulary.
        """

        def keep(seen: Intermediates) -> Intermediates:
            q, k = seen["rotated_query"], seen["rotated_key"]
            return seen | {"attention_logits": attention_logits(q, k, self.c.logit_scale)}

        x, seen = self.apply_layers(params, inputs, segments, keep)
        return seen | {"final": x, "logits": self.unembed(params, self.final_hidden(params, x))}

    def mean_squares(self, params: Params, inputs: Tokens, segments: Segments) -> Intermediates:
        """The mean square of each of `intermediates` on this device, of which none is kept: [L] for those of layers, else [].

        Unlike those, the logits are of the real vocabulary: none of the padding.
        """

        def keep(seen: Intermediates) -> Intermediates:
            q, k = seen["rotated_query"], seen["rotated_key"]
            return jax.tree.map(_mean_square, seen) | {"attention_logits": attention_mean_square(q, k, self.c.logit_scale)}

        x, kept = self.apply_layers(params, inputs, segments, keep)
        logits = mean_square_of_logits(self.final_hidden(params, x), params.unembed, *self._head(params))
        return kept | {"final": _mean_square(x), "logits": logits}

    def loss(
        self, params: Params, tokens: Tokens, mask: Bool[Array, "b T"], segments: Segments, bos_id: int
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Sums over this device's unmasked targets: of the objective, and of the loss in nats. The same on all of y. Only the
        objective has a gradient.

        Each segment is predicted as if it were alone in a row: its first token from bos, the others from their own segment.
        Positions need no change, since rotary positions are relative.
        """
        return head_loss(*self._head_inputs(params, tokens, mask, segments, bos_id))

    def target_losses(
        self, params: Params, tokens: Tokens, mask: Bool[Array, "b T"], segments: Segments, bos_id: int
    ) -> Float[Array, "b T"]:
        """The loss of each target in nats, 0 where it is masked; as `loss`, without a gradient."""
        return target_losses(*self._head_inputs(params, tokens, mask, segments, bos_id))

    def _head_inputs(self, params: Params, tokens: Tokens, mask: Array, segments: Segments, bos_id: int) -> tuple[Any, ...]:
        bias, head = self._head(params)
        x, _ = self.apply_layers(params, ops.shift_right(tokens, bos_id, segments), segments)
        return self.final_hidden(params, x), params.unembed, bias, tokens, mask, head

    def _head(self, params: Params) -> tuple[Array | None, Head]:
        """The bias of the unembedding, and its static settings."""
        assert self.c.n_vocab is not None
        bias = self.gather(params.b_unembed, self.specs.b_unembed)
        return bias, Head(self.specs.unembed, self.policy, self.c.n_vocab, self.execution.head_chunk, self.z_loss)

    def gather(self, w: Array | None, s: Weight | None) -> Any:
        """A weight over x, as the mathematics takes it: a Matrix, or a vector in the compute dtype."""
        if w is None or s is None:
            return None
        if s.is_matrix:
            return gather_matrix(w, s, self.policy, regather=self.execution.remat == "none")
        return self.gather_vector(w, s)

    def gather_vector(self, w: Array, s: Weight, typed: Any = None) -> Array:
        return gather_x(w, s, self.policy.compute, self.policy.grad_reduce_dtype, typed)

    def gather_y(self, x: Stream) -> Float[Array, "b T M"]:
        return gather_y(x, self.execution.via_all_to_all)

    def scatter_y(self, x: Float[Array, "b T M"]) -> Stream:
        return scatter_y(x, self.execution.via_all_to_all)

    def norm(self, x: Stream, g: Array | None) -> Stream:
        return _gained(ops.rms_norm_y(x, self.c.norm_eps), g)


def _kv(seen: Intermediates) -> KVCache:
    return KVCache.of(seen["rotated_key"], seen["value"])


def _unstacked(blocks: Block[Array]) -> list[Block[Array]]:
    """The weights of each layer. By lax.split, whose gradient is one concatenation: that of an index is padded to all layers."""
    leaves, tree = jax.tree.flatten(blocks)
    layers = zip(*(lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(tree, [jnp.squeeze(leaf, 0) for leaf in layer]) for layer in layers]


def _mean_square(x: Array) -> Array:
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def _times(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def _gained(x: Array, g: Array | None) -> Array:
    return x if g is None else x * _as_last(g, x)


def _plus(x: Array, b: Array | None) -> Array:
    return x if b is None else x + _as_last(b, x)


def _as_last(w: Array, x: Array) -> Array:
    """w with dims of size 1 in front, so that it broadcasts against x's last dims."""
    return w.reshape((1,) * (x.ndim - w.ndim) + w.shape)
