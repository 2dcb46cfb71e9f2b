"""Initial values of weights."""

from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from mutransformer.mup.rules import Parameter, Scaling, init_std


def init_weights(specs: Any, scaling: Scaling, seed: Int[Array, ""] | int) -> Any:
    """The initial values of a tree of Parameters, in float32: gains are one, biases zero, matrices from a normal distribution.

    The random key of a weight folds in its path (or its explicit init_tag), so adding a weight leaves the initial values of the
    others unchanged. The values do not depend on the mesh.
    """
    root = jax.random.key(seed)

    def draw(path: tuple, w: Parameter) -> Array:
        if w.role in ("gain", "qk_gain", "outer_gain"):
            return jnp.ones(w.shape, jnp.float32)
        std = init_std(w, scaling)
        if std == 0:
            return jnp.zeros(w.shape, jnp.float32)
        tag = crc32(jax.tree_util.keystr(path).encode()) if w.init_tag is None else w.init_tag
        return std * jax.random.normal(jax.random.fold_in(root, tag), w.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, specs)
