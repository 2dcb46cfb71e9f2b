"""How a step is made fast or small: what the config leaves open is chosen here, by device and mesh. Nothing of it changes what is
computed. Gains are seconds of a simulated step: 1.3 G parameters, 2^20 tokens in rows of 256, 64 chips of v5p; all of them, and
how they were found, are in results/scale.
"""

from collections.abc import Callable
from typing import Any

import jax

from mutransformer.config.schema import Config
from mutransformer.model.flags import tuning
from mutransformer.sharding.mesh import traced_for

# What a layer keeps for its backward pass by name, beside its input; the rest is computed again. "attended" is all that
# attention's gradient needs of its result. At 64 x 1: attention 0.434 and 13.5 GB a chip, dots 0.388 and 19.5 GB.
_KEPT = {
    "full": (),
    "outputs": ("attended", "middle"),  # only the products that lead up to attention and to the activation are made again
    "attention": ("query", "key", "value", "attended", "middle"),
    "dots": ("query", "key", "value", "attended", "middle", "hidden", "gate"),  # no product with a weight is made again
}
_HEAD_CHUNK_CPU = 512  # tokens; tuned on two cores
_HEAD_BYTES = 512 << 20  # of float32 logits: the sum of the unembedding's gradient, as large, is read and written once a chunk


def keeping(layer: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """The layer, with model.remat applied. For use in a scan: see jax.checkpoint's prevent_cse."""
    if config.model.remat == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[config.model.remat])
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)


def streams(config: Config, rows: int) -> int:
    """In how many parts a device's rows go through the layers: while one waits for y, the other computes. 0.641 -> 0.538 at
    16 x 4, two for one.

    Unasked, two with y > 1, but only where the backward pass computes layers again: else each would gather its weights there.
    Rows that do not divide, unasked, go through as one.
    """
    wanted = config.mesh.overlap_groups or (2 if config.mesh.y > 1 and config.model.remat != "none" else 1)
    return wanted if rows % wanted == 0 else 1


def exchanges(config: Config) -> bool:
    """Whether sums over y go by an all-to-all: see collectives.scatter_y. 0.575 -> 0.538 at 16 x 4."""
    wanted = config.mesh.reduce_scatter_via_all_to_all
    return tuning(traced_for().device_kind).exchange if wanted is None else wanted


def head_chunk(config: Config) -> int:
    """Tokens whose logits exist at a time."""
    given = config.model.head_chunk
    if given is not None:
        return given
    if traced_for().platform == "cpu":
        return _HEAD_CHUNK_CPU
    fit = _HEAD_BYTES // (4 * config.model.padded_vocab // config.mesh.y)
    return max(1, 1 << (fit.bit_length() - 1))  # a power of two, that divides the usual numbers of tokens
