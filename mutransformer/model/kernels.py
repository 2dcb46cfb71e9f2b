"""Causal softmax attention by the kernels that come with JAX: splash attention on a TPU, cuDNN's on an NVIDIA GPU.

Their limits are in `config.kernels`. Per device, pure; the gradient is the kernel's own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from jaxtyping import Float, Int

from mutransformer.config.kernels import SPLASH_MULTIPLE
from mutransformer.sharding.collectives import varying_as, without_vma_check

# Rows and columns of splash attention's blocks of logits. Blocks on the diagonal are computed in full: larger blocks compute more
# of the masked half, smaller ones read keys and values more often.
BLOCK = 512


def cudnn(
    q: Float[Array, "b T h D"],
    k: Float[Array, "b T k D"],
    v: Float[Array, "b T k D"],
    scale: float,
    segments: Int[Array, "b T"] | None,
) -> Float[Array, "b T h D"]:
    """cuDNN's fused attention. It takes segments as a T x T mask, which it adds to the logits."""
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True, implementation="cudnn")


def _splash_forward(q: Array, k: Array, v: Array, segments: Array | None, interpret: bool) -> tuple[Array, Callable[..., Any]]:
    def forward(q: Array, k: Array, v: Array, segments: Array | None) -> Any:
        return jax.vjp(lambda q, k, v: _splash(q, k, v, segments, interpret), q, k, v)

    return varying_as(without_vma_check(forward)(q, k, v, segments), q)


def _splash_backward(interpret: bool, pull: Callable[..., Any], grad: Array) -> tuple[Array, Array, Array, None]:
    def backward(pull: Any, grad: Array) -> Any:
        with jax.named_scope("splash_attention"):
            return pull(grad)

    return *varying_as(without_vma_check(backward)(pull, grad), grad), None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def splash(
    q: Float[Array, "b h T D"],
    k: Float[Array, "b k T D"],
    v: Float[Array, "b k T D"],
    segments: Int[Array, "b T"] | None,
    interpret: bool,
) -> Float[Array, "b h T D"]:
    """JAX's splash attention; what it saves for the backward pass is of size T.

    Its kernels have no VMA annotations, which shard_map's check needs. So the kernels alone are traced without the check, forward
    and backward; everything else, collectives above all, is checked. q, k and v must vary over the same mesh axes, and q is
    scaled already. interpret: without the kernel compiler, slowly, for a CPU.
    """
    return _splash_forward(q, k, v, segments, interpret)[0]


splash.defvjp(_splash_forward, _splash_backward)


def _splash(q: Array, k: Array, v: Array, segments: Array | None, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # importing takes a second

    _, h, T, _ = q.shape
    block = next(n for n in range(min(BLOCK, T), 0, -SPLASH_MULTIPLE) if T % n == 0)
    # The gradient of q by one kernel, those of k and v by another. The fused kernel computes the logits one time less, but writes
    # a rounded part of q's gradient for each block of keys; as XLA compiles the sum of these parts, it costs more than it saves.
    keys = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = library.BlockSizes(**dict.fromkeys(keys, block))
    kernel: Any = library.make_splash_mha(
        library.MultiHeadMask([library.CausalMask((T, T))] * h),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )
    with jax.named_scope("splash_attention"):
        ids = None if segments is None else library.SegmentIds(segments, segments)
        return jax.vmap(kernel)(q, k, v, ids)
