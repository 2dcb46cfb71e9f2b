"""What an exported folder does not tell of a run's weights, kept beside them, so that the run comes back bit for bit.

A factor that is no power of two takes several weights to the same number. Dividing by it gives a weight to a few units in the
last place: these, mostly 0, are kept as small whole numbers. Rows that pad the vocabulary, and an embedding that is normalized in
the folder, are kept as they were.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from mutransformer.config.schema import ModelConfig
from mutransformer.exchange.classes import HFClass
from mutransformer.exchange.folds import Array, NotInvertible, Tensors, by_name, unfold
from mutransformer.model.weights import Transformer
from mutransformer.training.program import Program

Integers = Int[np.ndarray, "..."]
Kept = dict[str, np.ndarray]  # by "kind.weight"; kinds: whole, units (in the last place, to be added), padding


def remainders(program: Program, params: Transformer[Any], tensors: Tensors, hf: HFClass) -> Kept:
    """What `unfold` does not find of weights on the host that were folded to these tensors. Empty if it finds every bit."""
    c, ours = program.config.model, by_name(params)
    found = by_name(unfold(program, tensors, hf))
    kept: Kept = {}
    for name, w in ours.items():
        w = np.asarray(w)
        if c.embed_norm and name in ("embed", "embed_norm"):
            kept[f"whole.{name}"] = w
            continue
        units = _bits(w) - _bits(found[name])
        if name in (pads := _padding(c)):
            if np.any(units[pads[name]]):
                kept[f"padding.{name}"] = w[pads[name]]
            units[pads[name]] = 0
        if np.any(units):
            kept[f"units.{name}"] = _narrow(units)
    return kept


def complete(program: Program, found: Transformer[Any], kept: Mapping[str, np.ndarray]) -> Transformer[Any]:
    """The weights that `unfold` found, with what was kept. Raises NotInvertible if it is of weights with other shapes."""
    pads = _padding(program.config.model)

    def of(kind: str, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        given = kept.get(f"{kind}.{name}")
        if given is not None and given.shape != shape:
            raise NotInvertible(f"{kind}.{name} has shape {given.shape}, and not {shape}")
        return given

    def one(path: tuple[Any, ...], w: Array) -> Array:
        name = path[-1].name
        whole, units = of("whole", name, w.shape), of("units", name, w.shape)
        w = w.copy() if whole is None else whole
        if units is not None:
            w = (_bits(w) + units.astype(np.int32)).view(np.float32)
        padding = of("padding", name, w[pads[name]].shape) if name in pads else None
        if padding is not None:
            w[pads[name]] = padding
        return w

    return jax.tree_util.tree_map_with_path(one, found)


def _padding(c: ModelConfig) -> dict[str, Any]:
    """Where a weight has rows that pad the vocabulary."""
    n = c.n_vocab
    return {"embed": np.s_[n:], "unembed": np.s_[:, n:], "b_unembed": np.s_[n:]}


def _bits(w: Array) -> Integers:
    """Those of neighboring float32 values of the same sign differ by 1. Sums and differences wrap around, which is undone."""
    return np.asarray(w, np.float32, order="C").view(np.int32)


def _narrow(units: Integers) -> Integers:
    """In the smallest type that holds them."""
    kinds = (np.int8, np.int16, np.int32)
    return units.astype(next(kind for kind in kinds if np.array_equal(units, units.astype(kind))))
