"""What a Pallas kernel computes: XLA does not know, and would let it pass as free. Known is splash attention; others are told."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mutransformer.errors import ConfigError

Shape = tuple[int, ...]
BLOCK = 512  # of queries and of keys, where a kernel does not say

# Matrix products over the blocks of queries and keys that the causal mask keeps. q k^T and p v; in the backward passes q k^T is
# computed again in each. A dkv kernel that gives dq too has one more.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclass(frozen=True)
class Kernels:
    """How Pallas kernels are costed: FLOPs at a share of the matrix units' peak.

    Attributes:
        flops: of one call on one device, by a regular expression on the kernel's name in its op_name.
        efficiency: the share. No kernel was timed: an assumption.
    """

    flops: Mapping[str, float] = field(default_factory=dict)
    efficiency: float = 0.5

    def flops_of(self, name: str, operands: Sequence[Shape], results: Sequence[Shape], details: str = "") -> float | None:
        """FLOPs of one call; None if nothing is known of this kernel.

        Args:
            name: the op_name, or the kernel's own.
            operands: shapes of the arrays read.
            results: of those written.
            details: text that may hold the kernel's block sizes, as splash attention's metadata does.
        """
        for pattern, flops in self.flops.items():
            if re.search(pattern, name):
                return flops
        found = re.findall(r"splash_\w*?_(fwd|dq|dkv)", name)
        return _splash(found[-1], operands, results, details) if found else None


def _splash(phase: str, operands: Sequence[Shape], results: Sequence[Shape], details: str) -> float | None:
    """Causal attention over rows of T: the largest operand is q or its like, [..., heads, T, D]."""
    q = max((shape for shape in operands if len(shape) >= 3), key=math.prod, default=None)
    if q is None:
        return None
    products = _PRODUCTS[phase]
    if phase == "dkv" and any(len(shape) > len(q) for shape in results):  # dq too, a part by block of keys, not yet summed
        products += 1
    block_q, block_kv = (min(_block(which, details), q[-2]) for which in ("q", "kv"))
    return 2.0 * products * math.prod(q) * q[-2] * causal_share(q[-2], block_q, block_kv)


def _block(which: str, details: str) -> int:
    found = re.search(rf"\bblock_{which}(?:_dq|_dkv)?\W+(\d+)", details)
    return int(found[1]) if found else BLOCK


def causal_share(T: int, block_q: int, block_kv: int) -> float:
    """Of the T x T pairs, those in blocks that hold any pair of a query and a key not behind it."""
    n_q, n_kv = -(-T // block_q), -(-T // block_kv)
    kept = sum(min(n_kv, -(-(i + 1) * block_q // block_kv)) for i in range(n_q))
    return kept / (n_q * n_kv)


def parse(given: Sequence[str], efficiency: float) -> Kernels:
    """Reads `REGEX=FLOPS` arguments.

    Raises:
        ConfigError: one is not of that form, or the efficiency is not in (0, 1].
    """
    flops = {}
    for text in given:
        pattern, _, number = text.rpartition("=")
        try:
            re.compile(pattern)
            flops[pattern] = float(number)
        except (ValueError, re.error):
            raise ConfigError(f"--kernel-flops {text}: write REGEX=FLOPS, as in splash_mha_fwd=1.2e11") from None
        if not pattern or not 0 <= flops[pattern] < math.inf:
            raise ConfigError(f"--kernel-flops {text}: write REGEX=FLOPS, as in splash_mha_fwd=1.2e11")
    if not 0 < efficiency <= 1:
        raise ConfigError(f"--kernel-efficiency {efficiency}: must lie in (0, 1]")
    return Kernels(flops, efficiency)
