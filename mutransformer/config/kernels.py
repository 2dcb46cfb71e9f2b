"""Which attention kernel a device has, and what each can compute. Does not import JAX."""

import re
from typing import Literal

AttentionKernel = Literal["auto", "xla", "splash", "cudnn"]

SPLASH_MULTIPLE = 128  # must divide the number of positions: the lanes of a TPU's vector registers
SPLASH_HEAD = 64  # must divide a head's size
# Minimum sequence length at which auto selects splash attention: a shorter row's logits are cheap to write out.
SPLASH_FROM = 512
CUDNN_HEAD = 8  # must divide a head's size
CUDNN_MAX_HEAD = 128  # on every GPU that has the kernel; Hopper's takes twice that

# GPUs without cuDNN's kernel: other vendors', and those before Ampere.
_WITHOUT_CUDNN = re.compile(r"AMD|[VPK]\d+\b|\bT4\b|GTX|TITAN|RTX 20|Quadro", re.IGNORECASE)


def device_kernel(platform: str, kind: str) -> AttentionKernel:
    """The fastest kernel of a device, by jax.Device's platform and device_kind."""
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform in ("gpu", "cuda") and not _WITHOUT_CUDNN.search(kind) else "xla"


def unfit(kernel: AttentionKernel, activation: str, T: int, d_head: int, compute: str) -> str | None:
    """Why a kernel cannot compute an attention, as the end of an error message; None: it can.

    Args:
        kernel: the kernel.
        activation: model.attention_activation.
        T: positions.
        d_head: size of a head.
        compute: precision.compute.
    """
    if kernel in ("auto", "xla"):
        return None
    if activation != "softmax":
        return f"computes softmax only, not model.attention_activation = {activation}"
    if kernel == "splash":
        if T % SPLASH_MULTIPLE:
            return f"needs a multiple of {SPLASH_MULTIPLE} positions, not data.seq_len = {T}"
        if d_head % SPLASH_HEAD:
            return f"needs heads of a multiple of {SPLASH_HEAD}, not model.d_head = {d_head}"
        return None
    if compute != "bfloat16":
        return f"computes in bfloat16, not precision.compute = {compute}"
    if d_head % CUDNN_HEAD or d_head > CUDNN_MAX_HEAD:
        return f"needs heads of a multiple of {CUDNN_HEAD} up to {CUDNN_MAX_HEAD}, not model.d_head = {d_head}"
    return f"needs an even number of positions, not data.seq_len = {T}" if T % 2 else None
