"""The Transformer: what weights it has, and what it computes with them on one device of the mesh.

Modules hold weights only, and a tree of one class holds anything that there is one of per weight: specs, shardings, arrays,
multipliers. Functions hold the mathematics. Dims and their shards are those of `spec`; the residual stream is [b, T, m].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from mutransformer.config.schema import Config
from mutransformer.model import execution as levers
from mutransformer.model import ops
from mutransformer.model.attention import Cache, Past, attention, attention_at, attention_logits, cached
from mutransformer.model.matmul import Head, Precision, head_loss, look_up, project, whole
from mutransformer.mup import rules as mup
from mutransformer.sharding.collectives import gather_heads, gather_x, gather_y, scatter_y
from mutransformer.sharding.spec import Init, Role, Weight, weight

T = TypeVar("T")  # Weight, NamedSharding, Array, float, bool, ...
Activations = dict[str, Array]
Segments = Int[Array, "b T"] | None  # of the targets, and so of the inputs that predict them; None: a row is one


class Block(eqx.Module, Generic[T]):
    """A layer; None where the config has no such weight. g: gain, w: matrix, b: bias.

    a: before attention, q k v o: its projections, f: before the feed-forward part, g i o: its gate, its input and output.
    """

    w_q: T
    w_k: T
    w_v: T
    w_o: T
    w_up: T
    w_down: T
    w_gate: T | None
    attn_norm: T | None
    q_norm: T | None
    k_norm: T | None
    mlp_norm: T | None
    b_q: T | None
    b_k: T | None
    b_v: T | None
    b_o: T | None
    b_up: T | None
    b_down: T | None
    b_gate: T | None


class Transformer(eqx.Module, Generic[T]):
    embed: T
    blocks: Block[T]  # arrays are stacked over layers in dim 0
    unembed: T
    embed_norm: T | None
    final_norm: T | None
    b_unembed: T | None


def block_specs(config: Config) -> Block[Weight]:
    """The weights of one layer."""
    c = config.model
    sizes = {"M": c.d_model, "H": c.n_head, "K": c.kv_heads, "D": c.d_head, "F": c.d_ff}
    w = partial(weight, sizes=sizes)
    gated = c.activation == "swiglu"
    # Key/value heads that y cannot divide rest split inside the head, and are gathered after their projection.
    kv = "K/y D" if c.kv_heads % config.mesh.y == 0 else "K D/y"

    def bias(dims: str) -> Weight | None:
        return w(f"-> {dims}", role="bias") if c.biases else None

    return Block(
        w_q=w("M/x -> H/y D", init=_start(c.q_init)),
        w_k=w(f"M/x -> {kv}"),
        w_v=w(f"M/x -> {kv}"),
        w_o=w("H/y D -> M/x", role="residual", init=_start(c.residual_init)),
        w_up=w("M/x -> F/y", init_tag=0x783FFEC3),
        w_down=w("F/y -> M/x", role="residual", init=_start(c.residual_init), init_tag=0x915C5BF6),
        w_gate=w("M/x -> F/y", init_tag=0x9F87D3C4) if gated else None,
        attn_norm=_gain(config, w, "M/y", "gain"),
        q_norm=_gain(config, w, "D", "qk_gain") if c.qk_norm else None,
        k_norm=_gain(config, w, "D", "qk_gain") if c.qk_norm else None,
        mlp_norm=_gain(config, w, "M/y", "gain"),
        b_q=bias("H/y D"),
        b_k=bias(kv),
        b_v=bias(kv),
        b_o=bias("M/y"),
        b_up=bias("F/y"),
        b_down=bias("M/y"),
        b_gate=bias("F/y") if gated else None,
    )


def specs(config: Config) -> Transformer[Weight]:
    """All weights. Needs no device."""
    c = config.model
    w = partial(weight, sizes={"M": c.d_model, "V": c.padded_vocab})
    return Transformer(
        embed=w("V/x -> M/y"),
        blocks=jax.tree.map(lambda s: s.stacked(c.n_layer), block_specs(config)),
        unembed=w("M/x -> V/y", init=c.unembed_init),
        embed_norm=_gain(config, w, "M/y", "outer_gain") if c.embed_norm else None,
        final_norm=_gain(config, w, "M/y", "outer_gain"),
        b_unembed=w("-> V/y", role="outer_bias") if c.biases else None,
    )


def flops_per_token(config: Config) -> float:
    """Forward and backward, by convention: 6 per weight of a matrix that multiplies, and attention over all T positions.

    The embedding is a look-up and does not count; recomputation for remat does not count (Chowdhery et al., arXiv 2204.02311,
    appendix B).
    """
    c = config.model
    weights = sum(w.size for w in jax.tree.leaves(specs(config)) if w.is_matrix and w.role != "input")
    return 6.0 * weights + 12.0 * c.n_layer * c.n_head * c.d_head * config.data.seq_len


def _gain(config: Config, w: Callable[..., Weight], dim: str, role: Role) -> Weight | None:
    return {"none": None, "vector": w(f"-> {dim}", role=role), "scalar": w("->", role=role)}[config.model.norm_scale]


def _start(choice: str) -> Init:
    return "zero" if choice == "zero" else "rule"


class Forward:
    """The mathematics of a config, for use inside shard_map on this device's shards."""

    def __init__(self, config: Config, watch: bool = False, whole: bool = False, cache: bool = False):
        """watch: keep what `activations` returns; else nothing of it is computed. whole: weights come whole along x, and their
        gradients stay so, this device's own, in float32; see `gathered`. cache: for `read`."""
        self.watch, self.cache = watch, cache
        self.config, self.c = config, config.model
        self.specs, self.block_specs = specs(config), block_specs(config)
        if whole:
            self.specs, self.block_specs = (jax.tree.map(lambda w: w.off("x"), tree) for tree in (self.specs, self.block_specs))
        self.pspecs = jax.tree.map(lambda w: w.pspec, self.specs)
        self.precision = Precision(config.precision.compute, "float32" if whole else config.precision.grad_reduce_dtype)
        self.use = partial(gather_x, compute=self.precision.compute, reduce=self.precision.grad_reduce_dtype)

    def gathered(self, params: Transformer[Array]) -> Transformer[Array]:
        """All weights whole along x, rounded to the compute dtype but typed float32. Gradient: summed over x, and scattered."""
        return jax.tree.map(partial(self.use, typed=jnp.float32), params, self.specs)

    def residual(
        self, params: Transformer[Array], inputs: Int[Array, "b T"], segments: Segments, past: Past | None = None
    ) -> tuple[Float[Array, "b T m"], Activations]:
        """The residual stream behind the last layer, and what was watched in the layers, stacked over them."""
        c, s = self.c, self.specs
        x = look_up(self.use(params.embed, s.embed, typed=jnp.float32), inputs, s.embed, self.precision.compute)
        if c.embed_norm:
            x = self.norm(x, self.whole(params.embed_norm, s.embed_norm))

        def layer(xs: tuple[Array, ...], of: tuple[Block[Array], Any]) -> tuple[tuple[Array, ...], Activations]:
            block, cache = of
            w = jax.tree.map(self.whole, block, self.block_specs)
            own = None if past is None else Past(cache, past.position)
            streams = [self.layer(w, x, rows, own) for x, rows in zip(xs, parts, strict=True)]
            return tuple(x for x, _ in streams), streams[0][1]

        n = 1 if self.watch or self.cache else levers.streams(self.config, inputs.shape[0])
        parts = jnp.split(segments, n) if segments is not None else [None] * n
        xs, seen = lax.scan(levers.keeping(layer, self.config), tuple(jnp.split(x, n)), (params.blocks, past and past.cache))
        return jnp.concatenate(xs), seen

    def layer(
        self, w: "Block[Any]", x: Float[Array, "b T m"], segments: Segments, past: Past | None
    ) -> tuple[Float[Array, "b T m"], Activations]:
        seen = self.seen(residual=x)
        branch, in_attention = self.attention(w, x, segments, past)
        x = checkpoint_name(x + self.times(branch, self.block_specs.w_o), "middle")
        branch, in_feed_forward = self.feed_forward(w, x)
        x = x + self.times(branch, self.block_specs.w_down)
        return x, seen | in_attention | in_feed_forward

    def gather_y(self, x: Float[Array, "b T m"]) -> Float[Array, "b T M"]:
        return gather_y(x, levers.exchanges(self.config))

    def scatter_y(self, x: Float[Array, "b T M"]) -> Float[Array, "b T m"]:
        return scatter_y(x, levers.exchanges(self.config))

    def attention(
        self, w: "Block[Any]", x: Float[Array, "b T m"], segments: Segments, past: Past | None
    ) -> tuple[Float[Array, "b T m"], Activations]:
        c, s = self.c, self.block_specs
        h = self.gather_y(self.norm(x, w.attn_norm))
        q = self.bias(project(h, w.w_q, s.w_q, self.precision), w.b_q)
        k = self.bias(project(h, w.w_k, s.w_k, self.precision), w.b_k)
        v = self.bias(project(h, w.w_v, s.w_v, self.precision), w.b_v)
        if s.w_k.dims[-1].axis == "y":
            k, v = (ops.select_kv(gather_heads(z), q.shape[2], c.n_head) for z in (k, v))
        seen = self.seen(query=q, key=k, value=v)
        if c.qk_norm:
            q, k = self.gain(ops.rms_norm(q, c.norm_eps), w.q_norm), self.gain(ops.rms_norm(k, c.norm_eps), w.k_norm)
        if c.rotary_base:
            first = None if past is None else past.position
            q, k = ops.rotary(q, c.rotary_base, first), ops.rotary(k, c.rotary_base, first)
        if self.watch:
            seen |= self.seen(rotated_query=q, rotated_key=k, attention_logits=attention_logits(q, k, c.logit_scale))
        kept = cached(k, v)._asdict() if self.cache else {}
        if past is None:
            o = attention(q, k, v, c.logit_scale, c.attention_activation, c.norm_eps, segments, c.attention_kernel)
        else:
            o = attention_at(q, k, v, past, c.logit_scale, c.attention_activation, c.norm_eps)
        r = self.scatter_y(project(o, w.w_o, s.w_o, self.precision))
        r = self.bias(r, w.b_o)
        return r, seen | kept | self.seen(attention_output=o, attention_branch=r)

    def feed_forward(self, w: "Block[Any]", x: Float[Array, "b T m"]) -> tuple[Float[Array, "b T m"], Activations]:
        c, s = self.c, self.block_specs
        h = self.gather_y(self.norm(x, w.mlp_norm))
        f = checkpoint_name(self.bias(project(h, w.w_up, s.w_up, self.precision), w.b_up), "hidden")
        seen = self.seen(feed_forward_hidden=f)
        if w.w_gate is None or s.w_gate is None:
            f = ops.ACTIVATIONS[c.activation](f)
        else:
            gate = checkpoint_name(self.bias(project(h, w.w_gate, s.w_gate, self.precision), w.b_gate), "gate")
            f = ops.ACTIVATIONS[c.activation](gate) * f
        r = self.scatter_y(project(f, w.w_down, s.w_down, self.precision))
        r = self.bias(r, w.b_down)
        return r, seen | self.seen(feed_forward_activation=f, feed_forward_branch=r)

    def read(self, params: Transformer[Array], inputs: Int[Array, "b T"], past: Past | None = None) -> tuple[Array, Cache]:
        """The residual stream [b T m] behind the last layer, and the inputs' keys and values, stacked over layers.

        Args:
            params: the weights.
            inputs: a row, or with a past the token at its position.
            past: of the row before that position; what it holds from there on does not count.
        """
        assert self.cache
        x, seen = self.residual(params, inputs, None, past)
        return x, Cache(seen["k"], seen["v"])

    def final(self, params: Transformer[Array], inputs: Int[Array, "b T"], segments: Segments) -> Float[Array, "b T M"]:
        """The normed residual stream that the unembedding reads, whole along y."""
        return self.unembed_input(params, self.residual(params, inputs, segments)[0])

    def unembed_input(self, params: Transformer[Array], x: Float[Array, "b T m"]) -> Float[Array, "b T M"]:
        x = self.gather_y(self.norm(x, self.whole(params.final_norm, self.specs.final_norm)))
        return self.times(x, self.specs.unembed)

    def logits(self, params: Transformer[Array], inputs: Int[Array, "b T"], segments: Segments) -> Float[Array, "b T v"]:
        """This device's slice of the padded vocabulary."""
        return self.unembed(params, self.final(params, inputs, segments))

    def unembed(self, params: Transformer[Array], h: Float[Array, "b T M"]) -> Float[Array, "b T v"]:
        s = self.specs
        y = project(h, self.whole(params.unembed, s.unembed), s.unembed, self.precision)
        return self.bias(y, self.whole(params.b_unembed, s.b_unembed))

    def activations(self, params: Transformer[Array], inputs: Int[Array, "b T"], segments: Segments) -> Activations:
        """What passes through the model, by name, on this device; those of the layers are stacked over them in dim 0.

        residual: the input of each layer. query, key, value: projections; rotated_…: as attention takes them. attention_logits:
        of the pairs that the causal mask lets through, even if of two segments. attention_output: before w_o; …_branch: what is
        added to the residual stream, before its multiplier. feed_forward_hidden, …_activation: before and after the activation.
        final: the residual stream behind the last layer. logits: over the padded vocabulary.
        """
        assert self.watch
        x, seen = self.residual(params, inputs, segments)
        return seen | self.seen(final=x, logits=self.unembed(params, self.unembed_input(params, x)))

    def seen(self, **named: Array) -> Activations:
        return named if self.watch else {}

    def loss(
        self,
        params: Transformer[Array],
        tokens: Int[Array, "b T"],
        mask: Bool[Array, "b T"],
        segments: Segments,
        bos_id: int,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The sum over unmasked targets of what is minimised for this device's rows, and of their losses, in nats; the same on
        all of y. Only the first has a gradient.

        With segments each is predicted as if it stood in a row alone: its first token from bos, the others from their own
        segment. Positions need no change, for rotary ones are relative.
        """
        assert self.c.n_vocab is not None
        s = self.specs
        bias = self.whole(params.b_unembed, s.b_unembed)
        head = Head(s.unembed, self.precision, self.c.n_vocab, levers.head_chunk(self.config), self.config.optim.z_loss)
        h = self.final(params, ops.shift_right(tokens, bos_id, segments), segments)
        return head_loss(h, params.unembed, bias, tokens, mask, head)

    def times(self, x: Float[Array, "b T _"], s: Weight) -> Float[Array, "b T _"]:
        """x times a weight's forward multiplier."""
        factor = mup.multiplier(s, self.config)
        return x if factor == 1 else x * jnp.asarray(factor, x.dtype)

    def whole(self, w: Array | None, s: Weight | None) -> Any:
        """A weight as the mathematics takes it: a Matrix, or an array in the compute dtype."""
        if w is None or s is None:
            return None
        return whole(w, s, self.precision, again=self.c.remat == "none") if s.is_matrix else self.use(w, s)

    def norm(self, x: Float[Array, "b T m"], g: Array | None) -> Float[Array, "b T m"]:
        return self.gain(ops.rms_norm_y(x, self.c.norm_eps), g)

    def gain(self, x: Array, g: Array | None) -> Array:
        return x if g is None else x * _as_last(g, x)

    def bias(self, x: Array, b: Array | None) -> Array:
        return x if b is None else x + _as_last(b, x)


def _as_last(w: Array, x: Array) -> Array:
    """w with dims of size 1 in front, so that it meets x's last dims."""
    return w.reshape((1,) * (x.ndim - w.ndim) + w.shape)
