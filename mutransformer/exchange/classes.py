"""The classes of `transformers` that can hold a model trained here: one table each, read in both directions.

A table pairs our weights with theirs. What we have and a class lacks, such as the factor on attention logits, is folded into a
weight, or stands in its config. Conventions that need nothing: heads and their groups, the halves of rotary positions, RMSNorm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mutransformer.config.schema import ModelConfig
from mutransformer.errors import ConfigError, check

# linear: [in ..., out ...] here, [out, in] there; table: [ids, width] in both; vector: flat there; gain: absent, one number or a
# vector here, a vector there.
Layout = Literal["linear", "table", "vector", "gain"]
# A factor that a row takes up unless the class keeps it in its config: see Factors in exchange.folds.
Fold = Literal["embedding", "query", "attention_branch", "mlp_branch", "logits"]


@dataclass(frozen=True)
class Row:
    """A weight: its field in model.weights, its name in transformers ({} is the layer), and what is folded into it."""

    ours: str
    theirs: str
    layout: Layout
    fold: Fold | None = None

    @property
    def in_layers(self) -> bool:
        return "{}" in self.theirs


class Setting(NamedTuple):
    """A setting of a class that holds a factor, or its inverse."""

    name: str
    inverse: bool = False

    def value(self, factor: float) -> float:
        """The setting; an inverse to 15 digits, so that one whose `factor` was taken comes back."""
        return float(f"{1 / factor:.15g}") if self.inverse else factor

    def factor(self, value: float) -> float:
        return 1 / value if self.inverse else value


@dataclass(frozen=True)
class HFClass:
    """A class of transformers and its table."""

    name: str
    model_type: str
    activations: Mapping[str, str]  # model.activation: hidden_act
    rows: tuple[Row, ...]
    qk_norm: bool = False
    keeps: Mapping[Fold, Setting] = field(default_factory=dict)  # factors that its config holds, instead of a weight

    @property
    def has_mlp_bias(self) -> bool:
        return any(row.ours == "b_up" for row in self.rows)


_PREFIX = "model.layers.{}."


def _projection(letters: str, theirs: str, fold: Fold | None = None, bias: bool = True) -> tuple[Row, ...]:
    matrix = Row(f"w_{letters}", f"{_PREFIX}{theirs}.weight", "linear", fold)
    return (matrix, Row(f"b_{letters}", f"{_PREFIX}{theirs}.bias", "vector", fold)) if bias else (matrix,)


def _rows(
    gated: bool,
    qk_norm: bool = False,
    mlp_bias: bool = True,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
) -> tuple[Row, ...]:
    """With norms of queries and keys the factor on attention logits goes into the queries' gain, else into their projection."""
    attention = (
        *_projection("q", "self_attn.q_proj", None if qk_norm else "query"),
        *_projection("k", "self_attn.k_proj"),
        *_projection("v", "self_attn.v_proj"),
        *_projection("o", "self_attn.o_proj", "attention_branch"),
    )
    gains = (
        Row("q_norm", f"{_PREFIX}self_attn.q_norm.weight", "gain", "query"),
        Row("k_norm", f"{_PREFIX}self_attn.k_norm.weight", "gain"),
    )
    return (
        Row("embed", "model.embed_tokens.weight", "table", "embedding"),
        Row("attn_norm", f"{_PREFIX}{norms[0]}.weight", "gain"),
        *attention,
        *(gains if qk_norm else ()),
        Row("mlp_norm", f"{_PREFIX}{norms[1]}.weight", "gain"),
        *(_projection("gate", "mlp.gate_proj", bias=mlp_bias) if gated else ()),
        *_projection("up", "mlp.up_proj", bias=mlp_bias),
        *_projection("down", "mlp.down_proj", "mlp_branch", mlp_bias),
        Row("final_norm", "model.norm.weight", "gain"),
        Row("unembed", "lm_head.weight", "linear", "logits"),
    )


_UNGATED = {"relu": "relu", "sqrelu": "relu2", "gelu": "gelu_pytorch_tanh", "silu": "silu"}
_GATED = {"swiglu": "silu"}
_APERTUS_NORMS = "attention_layernorm", "feedforward_layernorm"

LLAMA = HFClass("LlamaForCausalLM", "llama", _GATED, _rows(gated=True))
ARCEE = HFClass("ArceeForCausalLM", "arcee", _UNGATED, _rows(gated=False))
QWEN3 = HFClass("Qwen3ForCausalLM", "qwen3", _GATED, _rows(gated=True, qk_norm=True, mlp_bias=False), qk_norm=True)
APERTUS = HFClass(
    "ApertusForCausalLM",
    "apertus",
    _UNGATED,
    _rows(gated=False, qk_norm=True, mlp_bias=False, norms=_APERTUS_NORMS),
    qk_norm=True,
)
# Its residual_multiplier is that of both branches, which all parametrizations here have in common.
GRANITE = HFClass(
    "GraniteForCausalLM",
    "granite",
    _GATED,
    LLAMA.rows,
    keeps={
        "embedding": Setting("embedding_multiplier"),
        "query": Setting("attention_multiplier"),
        "attention_branch": Setting("residual_multiplier"),
        "mlp_branch": Setting("residual_multiplier"),
        "logits": Setting("logits_scaling", inverse=True),
    },
)

EXPORTED = (LLAMA, ARCEE, QWEN3, APERTUS)  # the first that fits is taken
IMPORTED = {c.name: c for c in (LLAMA, GRANITE, QWEN3, ARCEE, APERTUS)}

# The settings here of a factor that a class keeps in its config.
MULTIPLIERS: dict[Fold, str] = {
    "embedding": "model.embed_multiplier",
    "query": "model.qk_scale",
    "attention_branch": "model.residual_multiplier",
    "logits": "model.logits_multiplier",
}

# Settings that both sides have under different names.
SIZES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "head_dim": "d_head",
    "num_key_value_heads": "kv_heads",
    "vocab_size": "n_vocab",
    "intermediate_size": "d_ff",
    "num_attention_heads": "n_head",
    "rms_norm_eps": "norm_eps",
}


def class_of(c: ModelConfig, keep_multipliers: bool = False) -> HFClass:
    """The class that a model is exported to; keep_multipliers: Granite, which has settings for them.

    Raises ConfigError, naming the key, if no class computes what the model computes.
    """
    softmax = c.attention_activation == "softmax"
    check(softmax, f"model.attention_activation = {c.attention_activation}: every class to export to computes softmax")
    check(c.rotary_base > 0, "model.rotary_base = 0: every class to export to has rotary positions")
    if keep_multipliers:
        why = "--keep-multipliers exports to Granite, which needs swiglu"
        check(c.activation in GRANITE.activations, f"model.activation = {c.activation}: {why}")
        check(not c.qk_norm, "model.qk_norm = true: --keep-multipliers exports to Granite, which has no such norms")
        return GRANITE
    return next(one for one in EXPORTED if one.qk_norm == c.qk_norm and c.activation in one.activations)


def settings_for(c: ModelConfig, hf: HFClass, max_positions: int) -> dict[str, Any]:
    """The config of the class for a model, without the factors that it keeps and whether embeddings are tied."""
    return {
        **{theirs: getattr(c, ours) for theirs, ours in SIZES.items()},
        "attention_bias": c.has_bias("attention"),
        **({"mlp_bias": c.has_bias("feed_forward")} if hf.has_mlp_bias else {}),
        "hidden_act": hf.activations[c.activation],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(c.rotary_base)},
        "max_position_embeddings": max_positions,
    }


def overrides_from(config: dict[str, Any], where: str) -> tuple[HFClass, list[str]]:
    """The class of a folder's config, and the settings of a model that computes the same.

    Raises ConfigError, naming the setting, if there is no such model here.
    """
    name = (config.get("architectures") or ["none"])[0]
    check(name in IMPORTED, f"{where}: architectures = {name}: only {', '.join(IMPORTED)} can be imported")
    hf = IMPORTED[name]
    width, heads = config["hidden_size"], config["num_attention_heads"]
    d_head = config.get("head_dim") or width // heads
    ours = {theirs: key for key, theirs in hf.activations.items()}
    act = config["hidden_act"]
    check(act in ours, f"{where}: hidden_act = {act}: with {name} it must be {' or '.join(ours)}")
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    check(kind == "default", f"{where}: rope_type = {kind}: only default rotary positions can be imported")
    partial = rope.get("partial_rotary_factor", 1.0)
    check(partial == 1, f"{where}: partial_rotary_factor = {partial}: must be 1")
    check(not config.get("use_sliding_window"), f"{where}: use_sliding_window = true: there is no windowed attention here")
    for setting in hf.keeps.values():
        check(config[setting.name] > 0, f"{where}: {setting.name} = {config[setting.name]}: must be above 0")
    biased = {"attention": bool(config.get("attention_bias")), "feed_forward": bool(config.get("mlp_bias"))}
    return hf, [
        f"model.d_model={width}",
        f"model.d_base={width}",
        f"model.d_head={d_head}",
        f"model.attention_multiple={heads * d_head / width!r}",
        f"model.n_layer={config['num_hidden_layers']}",
        f"model.n_kv_head={config['num_key_value_heads']}",
        f"model.n_vocab={config['vocab_size']}",
        f"model.ff_multiple={_multiple(config['intermediate_size'], width)!r}",
        f"model.activation={ours[act]}",
        f"model.norm_eps={config['rms_norm_eps']!r}",
        f"model.rotary_base={float(rope.get('rope_theta', 10000.0))!r}",
        f"model.qk_scale={d_head**-0.5!r}",
        *(f"{key}={hf.keeps[fold].factor(config[hf.keeps[fold].name])!r}" for fold, key in MULTIPLIERS.items() if hf.keeps),
        f"model.qk_norm={'true' if hf.qk_norm else 'false'}",
        f"model.biases={'true' if any(biased.values()) else 'false'}",
        f"model.biases_in={next((part for part, has in biased.items() if has and not all(biased.values())), 'layers')}",
        "model.norm_scale=vector",
        "model.embed_norm=false",
    ]


def _multiple(d_ff: int, width: int) -> float:
    """model.ff_multiple for a width of the feed-forward layer. Raises ConfigError if none gives it."""
    near = d_ff / width
    for multiple in (near, math.nextafter(near, math.inf)):
        if int(multiple * width) == d_ff:
            return multiple
    raise ConfigError(f"intermediate_size = {d_ff}: no model.ff_multiple gives it at width {width}")
