"""FLOPs of kernels that XLA's cost model does not see: Pallas's, and cuDNN's attention.

Splash attention and cuDNN's are built in; others are given by the user.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mutransformer.errors import check
from mutransformer.model.attention import BLOCK

Shape = tuple[int, ...]

# Matrix products per pair of query and key blocks that the causal mask keeps: q k^T and p v forward; each backward kernel
# computes q k^T again. A dkv kernel that also returns dq has one more.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
# cuDNN's backward pass is one kernel: q k^T again, and the gradients of the weights, of q, k and v. Its blocks are not published.
_CUDNN_PRODUCTS = {"fwd": 2, "bwd": 5}
_CUDNN_BLOCK = 128


@dataclass(frozen=True)
class KernelFlops:
    """How kernels are costed: the FLOPs of one call on one device, at a fraction of the matrix units' peak."""

    flops: Mapping[str, float] = field(default_factory=dict)  # by a regular expression, searched for in the kernel's op_name
    efficiency: float = 0.5  # the fraction; an assumption: no kernel was timed

    def of_call(self, name: str, operands: Sequence[Shape], results: Sequence[Shape], details: str = "") -> float | None:
        """FLOPs of a call with an op_name; None if the kernel is unknown. details: text that may state block sizes."""
        for pattern, flops in self.flops.items():
            if re.search(pattern, name):
                return flops
        if cudnn := re.findall(r"dot_product_attention_(fwd|bwd)", name):
            return _cudnn(cudnn[-1], operands)
        phases = re.findall(r"splash_\w*?_(fwd|dq|dkv)", name)
        return _splash(phases[-1], operands, results, details) if phases else None


def _splash(phase: str, operands: Sequence[Shape], results: Sequence[Shape], details: str) -> float | None:
    """FLOPs of causal attention over rows of T. The largest operand has the shape of q, [..., heads, T, D]."""
    q = max((shape for shape in operands if len(shape) >= 3), key=math.prod, default=None)
    if q is None:
        return None
    products = _PRODUCTS[phase]
    if phase == "dkv" and any(len(shape) > len(q) for shape in results):  # also dq, one unsummed part per block of keys
        products += 1
    T, blocks = q[-2], []
    for which in ("q", "kv"):
        stated = re.search(rf"\bblock_{which}(?:_dq|_dkv)?\W+(\d+)", details)
        blocks.append(min(int(stated[1]) if stated else BLOCK, T))
    return 2.0 * products * math.prod(q) * T * causal_fraction(T, *blocks)


def _cudnn(phase: str, operands: Sequence[Shape]) -> float:
    """FLOPs of causal attention over rows of T. The first operand is q, [rows, T, heads, D]."""
    q, T = operands[0], operands[0][1]
    return 2.0 * _CUDNN_PRODUCTS[phase] * math.prod(q) * T * causal_fraction(T, min(T, _CUDNN_BLOCK), min(T, _CUDNN_BLOCK))


def causal_fraction(T: int, block_q: int, block_kv: int) -> float:
    """The fraction of the T x T (query, key) pairs that lie in blocks which the causal mask does not empty."""
    n_q, n_kv = -(-T // block_q), -(-T // block_kv)
    kept = sum(min(n_kv, -(-(i + 1) * block_q // block_kv)) for i in range(n_q))
    return kept / (n_q * n_kv)


BUILT_IN = KernelFlops()


def parse_kernel_flops(arguments: Sequence[str], efficiency: float) -> KernelFlops:
    """Reads `REGEX=FLOPS` arguments. Raises ConfigError if one is not of that form, or the efficiency is not in (0, 1]."""
    flops = {}
    for text in arguments:
        pattern, _, number = text.rpartition("=")
        try:
            re.compile(pattern)
            flops[pattern] = float(number)
            valid = pattern != "" and 0 <= flops[pattern] < math.inf
        except (ValueError, re.error):
            valid = False
        check(valid, f"--kernel-flops {text}: write REGEX=FLOPS, as in splash_mha_fwd=1.2e11")
    check(0 < efficiency <= 1, f"--kernel-efficiency {efficiency}: must lie in (0, 1]")
    return KernelFlops(flops, efficiency)
