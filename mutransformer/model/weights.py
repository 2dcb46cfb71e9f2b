"""The weights of the Transformer: one declaration each.

A tree of `Transformer` holds anything of which there is one per weight: specs, shardings, arrays, multipliers.
"""

from collections.abc import Callable
from functools import partial
from typing import Generic, Literal, TypeVar

import equinox as eqx
import jax

from mutransformer.config.schema import ModelConfig
from mutransformer.mup import Init, Role
from mutransformer.sharding.spec import Weight, weight

_INIT: dict[str, Init] = {"fan_in": "rule", "zero": "zero"}
T = TypeVar("T")  # Weight, NamedSharding, Array, float, bool, ...


class Block(eqx.Module, Generic[T]):
    """A layer; None where the config has no such weight. w_: matrix, b_: bias, _norm: gain of a norm."""

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


def block_specs(c: ModelConfig, y: int = 1) -> Block[Weight]:
    """The weights of one layer. y: the size of mesh axis y."""
    sizes = {"M": c.d_model, "H": c.n_head, "K": c.kv_heads, "D": c.d_head, "F": c.d_ff}
    w = partial(weight, sizes=sizes)
    write = partial(w, role="residual", init=_INIT[c.residual_init])
    gain = partial(_gain, c, w)
    gated = c.activation == "swiglu"
    # Key/value heads that y does not divide are sharded inside the head, and gathered after their projection.
    kv = "K/y D" if c.kv_heads % y == 0 else "K D/y"

    def bias(dims: str, part: Literal["attention", "feed_forward"]) -> Weight | None:
        return w(f"-> {dims}", role="bias") if c.has_bias(part) else None

    return Block(
        w_q=w("M/x -> H/y D", init=_INIT[c.q_init]),
        w_k=w(f"M/x -> {kv}"),
        w_v=w(f"M/x -> {kv}"),
        w_o=write("H/y D -> M/x"),
        # Explicit tags: these three were renamed, and published results rest on their initial values.
        w_up=w("M/x -> F/y", init_tag=0x783FFEC3),
        w_down=write("F/y -> M/x", init_tag=0x915C5BF6, nominal_fan_in=c.ff_multiple * c.d_model),
        w_gate=w("M/x -> F/y", init_tag=0x9F87D3C4) if gated else None,
        attn_norm=gain("M/y", "gain"),
        q_norm=gain("D", "qk_gain") if c.qk_norm else None,
        k_norm=gain("D", "qk_gain") if c.qk_norm else None,
        mlp_norm=gain("M/y", "gain"),
        b_q=bias("H/y D", "attention"),
        b_k=bias(kv, "attention"),
        b_v=bias(kv, "attention"),
        b_o=bias("M/y", "attention"),
        b_up=bias("F/y", "feed_forward"),
        b_down=bias("M/y", "feed_forward"),
        b_gate=bias("F/y", "feed_forward") if gated else None,
    )


def transformer_specs(c: ModelConfig, y: int = 1) -> Transformer[Weight]:
    """All weights. Needs no device. y: the size of mesh axis y."""
    w = partial(weight, sizes={"M": c.d_model, "V": c.padded_vocab})
    return Transformer(
        embed=w("V/x -> M/y"),
        blocks=jax.tree.map(lambda s: s.stacked(c.n_layer), block_specs(c, y)),
        unembed=w("M/x -> V/y", init=c.unembed_init),
        embed_norm=_gain(c, w, "M/y", "outer_gain") if c.embed_norm else None,
        final_norm=_gain(c, w, "M/y", "outer_gain"),
        b_unembed=w("-> V/y", role="outer_bias") if c.has_bias("unembedding") else None,
    )


def attention_flops_per_token(c: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of attention's own products, over all positions of a row."""
    return 12.0 * c.n_layer * c.n_head * c.d_head * seq_len


def flops_per_token(specs: Transformer[Weight], c: ModelConfig, seq_len: int) -> float:
    """Forward and backward, by convention: 6 per weight of a matrix that multiplies, and attention over all positions.

    The embedding is a look-up and does not count; recomputation for remat does not count (Chowdhery et al., arXiv 2204.02311,
    appendix B).
    """
    weights = sum(w.size for w in jax.tree.leaves(specs) if w.is_matrix and w.role != "input")
    return 6.0 * weights + attention_flops_per_token(c, seq_len)


def _gain(c: ModelConfig, w: Callable[..., Weight], dim: str, role: Role) -> Weight | None:
    return {"none": None, "vector": w(f"-> {dim}", role=role), "scalar": w("->", role=role)}[c.norm_scale]
