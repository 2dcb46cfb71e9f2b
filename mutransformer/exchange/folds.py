"""Weights by the table of a class: ours to theirs with all factors folded in, and theirs to ours with the factors taken out."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from mutransformer.config.schema import ModelConfig
from mutransformer.errors import check
from mutransformer.exchange.classes import Fold, HFClass, Row
from mutransformer.model.weights import Transformer
from mutransformer.sharding.spec import Weight
from mutransformer.training.program import Program

Array = Float[np.ndarray, "..."]
Tensors = dict[str, Array]  # by their names in transformers

ROUNDING = 2.0**-22  # relative: of a factor that is no power of two


class NotInvertible(Exception):
    """A tensor is not the fold of any weight of the model that is asked for. The message names it."""


def factors(program: Program) -> dict[Fold, float]:
    """What a class of transformers does not compute of itself: the factor on q . k beyond 1 / sqrt(d_head), the forward
    multipliers of the embedding, of the residual branches and of the logits."""
    c, m = program.config.model, program.forward.multipliers
    return {
        "query": c.logit_scale * math.sqrt(c.d_head),
        "embedding": m.embed,
        "attention_branch": m.blocks.w_o,
        "mlp_branch": m.blocks.w_down,
        "logits": m.unembed,
    }


def kept(program: Program, hf: HFClass) -> dict[str, float]:
    """The settings of a class that hold factors."""
    found = {**factors(program), "query": program.config.model.logit_scale}
    settings: dict[str, float] = {}
    for fold, setting in hf.keeps.items():
        value = setting.value(found[fold])
        assert settings.get(setting.name, value) == value, f"{setting.name} stands for two factors that differ"
        settings[setting.name] = value
    return settings


def fold(program: Program, params: Transformer[Any], hf: HFClass) -> Tensors:
    """Their tensors, float32, of our weights on the host. The padding of the vocabulary is cut off.

    Raises ConfigError, naming the key, if a weight that the class lacks is not zero.
    """
    c, factor = program.config.model, _factors(program, hf)
    weights, specs = by_name(params), by_name(program.specs)
    _check_complete(c, hf, weights)
    tensors: Tensors = {}
    for row in hf.rows:
        w, spec = weights.get(row.ours), specs.get(row.ours)
        if w is None and row.layout != "gain":
            continue
        if w is not None and row.ours == "embed" and c.embed_norm:  # before its factor
            w = _normed(w, weights.get("embed_norm"), c.norm_eps)
        layers = range(c.n_layer) if row.in_layers else [None]
        for i in layers:
            one = None if w is None else np.asarray(w if i is None else w[i])
            width = c.d_head if row.ours in ("q_norm", "k_norm") else c.d_model
            there = _there(one, row, n_out=spec.n_out if spec else 0, width=width, n_vocab=c.n_vocab)
            tensors[row.theirs.format(i)] = np.ascontiguousarray(_times(there, factor.get(row.fold, 1.0)))
    return tensors


def unfold(program: Program, tensors: Mapping[str, Array], hf: HFClass) -> Transformer[Any]:
    """Our weights, float32 on the host, of their tensors, to a rounding of the factors.

    Rows that pad the vocabulary, and biases that they lack, are zero. The norm of an embedding is not undone: then the result
    folds to other tensors.

    Raises:
        NotInvertible: a gain of theirs is none of this model's.
        ConfigError: a tensor is missing, or has another shape than the settings give.
    """
    c, factor = program.config.model, _factors(program, hf)
    rows = {row.ours: row for row in hf.rows}

    def one(name: str, spec: Weight) -> Array:
        row = rows.get(name)
        in_layers = spec.dims[:1] and spec.dims[0].name == "L"
        shape = spec.shape[1:] if in_layers else spec.shape
        if row is None or (row.ours.startswith("b_") and row.theirs.format(0) not in tensors):
            return np.full(spec.shape, float(spec.role.endswith("gain")), np.float32)
        names = [row.theirs.format(i) for i in range(c.n_layer)] if in_layers else [row.theirs]
        found = []
        for theirs in names:
            check(theirs in tensors, f"{theirs}: no such tensor in the folder")
            t = _times(tensors[theirs], 1 / factor.get(row.fold, 1.0))
            found.append(_here(t, row, shape, spec.n_out, theirs, c))
        return np.stack(found) if in_layers else found[0]

    def check_absent(name: str) -> None:
        """A gain that the model does not have must be one, times what is folded into it."""
        row = rows.get(name)
        if row is not None and row.layout == "gain":
            for i in range(c.n_layer if row.in_layers else 1):
                if not np.all(tensors[row.theirs.format(i)] == np.float32(factor.get(row.fold, 1.0))):
                    raise NotInvertible(f"{row.theirs.format(i)} is not one everywhere")

    specs = by_name(program.specs)
    for name in rows.keys() - specs.keys():
        check_absent(name)
    weights = {name: one(name, spec) for name, spec in specs.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: weights[path[-1].name], program.specs)


def same(ours: Tensors, theirs: Mapping[str, Array], rounding: float = ROUNDING) -> bool:
    """Whether two sets of tensors are equal but for the rounding of a factor. Biases that are missing are zero."""
    for name in ours.keys() | theirs.keys():
        a, b = (np.float64(side[name]) if name in side else np.float64(0) for side in (ours, theirs))
        if a.ndim and b.ndim and a.shape != b.shape or not np.all(np.abs(a - b) <= rounding * np.abs(b)):
            return False
    return True


def _factors(program: Program, hf: HFClass) -> dict[Fold | None, float]:
    return {fold: value for fold, value in factors(program).items() if fold not in hf.keeps}


def by_name(tree: Transformer[Any]) -> dict[str, Any]:
    """The weights of a tree by the name of their field, which is unique, leaving out what is None."""
    return {path[-1].name: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_complete(c: ModelConfig, hf: HFClass, weights: Mapping[str, Any]) -> None:
    known = {row.ours for row in hf.rows} | {"embed_norm"}
    for name in weights.keys() - known:
        w = weights[name]
        w = w[: c.n_vocab] if name == "b_unembed" else w
        what = "the unembedding's bias" if name == "b_unembed" else f"the bias {name}"
        check(not np.any(w), f"model.biases = true: {hf.name} has no place for {what}, which is not zero")


def _normed(table: Array, gain: Array | None, eps: float) -> Array:
    """The embedding as its norm leaves it: a row is normalized alone, wherever its token stands."""
    wide = table.astype(np.float64)
    wide /= np.sqrt(np.mean(np.square(wide), axis=-1, keepdims=True) + eps)
    return (wide if gain is None else wide * gain).astype(np.float32)


def _times(w: Array, factor: float) -> Array:
    return w if factor == 1 else (w.astype(np.float64) * factor).astype(np.float32)


def _there(w: Array | None, row: Row, n_out: int, width: int, n_vocab: int | None) -> Array:
    """A weight of one layer in their layout."""
    if row.layout == "gain":
        return np.full(width, 1.0 if w is None else w, np.float32) if w is None or w.ndim == 0 else w
    assert w is not None
    if row.layout == "vector":
        return w.reshape(-1)
    if row.layout == "table":
        return w[:n_vocab]
    fan_out = math.prod(w.shape[-n_out:])
    matrix = w.reshape(-1, fan_out).T
    return matrix[:n_vocab] if row.ours == "unembed" else matrix


def _here(t: Array, row: Row, shape: tuple[int, ...], n_out: int, name: str, c: ModelConfig) -> Array:
    """A tensor of theirs in our layout, padded to our vocabulary."""
    if row.layout == "gain" and not shape:
        if not np.all(t == t[0]):
            raise NotInvertible(f"{name} is not the same everywhere")
        return np.asarray(t[0])
    given = f"{name}: has shape {tuple(t.shape)}, the settings of the model give"
    if row.ours in ("embed", "unembed"):
        assert c.n_vocab is not None
        check(t.shape == (c.n_vocab, c.d_model), f"{given} {(c.n_vocab, c.d_model)}")
        t = np.pad(t, ((0, c.padded_vocab - c.n_vocab), (0, 0)))
    size, fan_out = math.prod(shape), math.prod(shape[-n_out:])
    expected = (fan_out, size // fan_out) if row.layout == "linear" else shape if row.layout == "table" else (size,)
    check(t.shape == expected, f"{given} {expected}")
    if row.layout == "linear":
        t = t.T
    return np.ascontiguousarray(t.reshape(shape))
