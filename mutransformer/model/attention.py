"""Attention, per device and pure: one function, computed by the implementation that `execution` resolved for the devices.

The kernels are those that come with JAX: splash attention on a TPU, cuDNN's on an NVIDIA GPU; their limits are in
`config.schema.unfit`. The forms in plain XLA are for devices without a kernel and for attention activations other than softmax.
Logits and softmax are float32 whatever the compute dtype. Dims are those of `sharding.spec`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from mutransformer.config.schema import SPLASH_MULTIPLE
from mutransformer.model.execution import Attention
from mutransformer.model.ops import MASKED, Segments, sqrelu
from mutransformer.sharding.collectives import varying_as, without_vma_check

# Rows and columns of splash attention's blocks of logits. Blocks on the diagonal are computed in full: larger blocks compute more
# of the masked half, smaller ones read keys and values more often.
BLOCK = 512


def _normalized(weights: Array, eps: float) -> Array:
    return weights / (eps + jnp.sum(weights, axis=-1, keepdims=True))


# Masked float32 logits [..., query, key] and the norm's eps -> weights of the same shape. Softmax has a form of its own, below.
ATTENTION_ACTIVATIONS: dict[str, Callable[[Array, float], Array]] = {
    "sqrelu": lambda s, eps: sqrelu(s) / s.shape[-1],
    "elu": lambda s, eps: (jax.nn.elu(s) + 1) / s.shape[-1],
    "norm_sqrelu": lambda s, eps: _normalized(sqrelu(s), eps),
    "norm_elu": lambda s, eps: _normalized(jax.nn.elu(s) + 1, eps),
}


class Layout(NamedTuple):
    """The order of the dims of softmax attention's arrays, as in einsum: b rows, k key/value heads, g query heads of each, q
    positions of queries, s positions of keys, d features of a head. g is missing where each key/value head has one query head."""

    q: str  # of queries and the output
    kv: str  # of keys and values
    blocks: bool  # compute the queries in `_query_blocks`; False: all at once

    @property
    def logits(self) -> str:
        return "bkgqs" if "g" in self.q else "bkqs"

    @property
    def products(self) -> tuple[str, str, str]:
        """Equations of queries by keys to logits, of logits by keys to queries, and of logits by queries to keys."""
        q, kv, logits = self.q, self.kv, self.logits
        return f"{q},{kv}->{logits}", f"{logits},{kv}->{q}", f"{logits},{q}->{kv}"

    def queries(self, x: Array, first: int, last: int) -> Array:
        """Positions first ... last - 1 of an array in the order of queries."""
        return lax.slice_in_dim(x, first, last, axis=self.q.index("q"))

    def keys(self, x: Array, last: int) -> Array:
        """Positions 0 ... last - 1 of keys or values."""
        return lax.slice_in_dim(x, 0, last, axis=self.kv.index("s"))

    def as_queries(self, x: Array) -> Array:
        """A number for each query, in the order of logits with a last dim of size 1, in the order of queries."""
        return jnp.transpose(x, [self.logits.replace("s", "d").index(letter) for letter in self.q])

    def as_logits(self, x: Array) -> Array:
        """The inverse of `as_queries`."""
        return jnp.transpose(x, [self.q.index(letter) for letter in self.logits.replace("s", "d")])

    def query_blocks(self, n: int) -> list[tuple[int, int]]:
        """Bounds of the blocks in which n queries are computed."""
        return _query_blocks(n) if self.blocks else [(0, n)]


HEADS_FIRST = Layout("bkgqd", "bksd", blocks=True)
# The order of the projections, which XLA:TPU then reads in place; and all logits at once, which it fuses with their softmax.
POSITIONS_FIRST = Layout("bqkd", "bskd", blocks=False)
POSITIONS_FIRST_GROUPED = Layout("bqkgd", "bskd", blocks=False)


def attention(
    q: Float[Array, "b T h D"],
    k: Float[Array, "b T k D"],
    v: Float[Array, "b T k D"],
    scale: float,
    activation: str,
    eps: float,
    segments: Segments = None,
    implementation: Attention = "blockwise",
) -> Float[Array, "b T h D"]:
    """Causal attention; query head i reads key/value head i // (h / k), with logits scale * (q . k).

    The activation is softmax, or a key of ATTENTION_ACTIVATIONS, of which the normalized ones add eps to the sum of weights. The
    implementation is that of softmax: the others have one form. A position reads its own segment only; None: a row is one.
    """
    b, T, h, D = q.shape
    o: Any  # custom_vjp loses the type
    if implementation in ("splash", "splash_interpreted"):
        q, k, v = (varying_as(a, q, k, v) for a in (q, k, v))
        # It takes no scale; scaling fuses with what came before, such as rotary positions.
        q = (scale * q.astype(jnp.float32)).astype(q.dtype)
        q, k, v = _named(*(jnp.transpose(a, (0, 2, 1, 3)) for a in (q, k, v)))
        o = splash_attention(q, k, v, segments, interpret=implementation == "splash_interpreted")
        return jnp.transpose(o, (0, 2, 1, 3))
    if implementation == "cudnn":
        q, k, v = (varying_as(a, q, k, v) for a in (q, k, v))
        # It takes segments as a T x T mask, which it adds to the logits.
        mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
        o = jax.nn.dot_product_attention(*_named(q, k, v), mask=mask, scale=scale, is_causal=True, implementation="cudnn")
        return checkpoint_name(o, "attended")
    n_kv = k.shape[2]
    if implementation == "dense" and activation == "softmax":
        q, k, v = _named(q, k, v)
        if h == n_kv:  # a group dim of size 1 would keep XLA:TPU from reading q in place
            return softmax_attention(q, k, v, segments, scale, POSITIONS_FIRST)
        q = q.reshape(b, T, n_kv, h // n_kv, D)
        o = softmax_attention(q, k, v, segments, scale, POSITIONS_FIRST_GROUPED)
        return o.reshape(b, T, h, D)
    q = jnp.transpose(q.reshape(b, T, n_kv, h // n_kv, D), (0, 2, 3, 1, 4))
    q, k, v = _named(q, *(jnp.transpose(a, (0, 2, 1, 3)) for a in (k, v)))
    if activation == "softmax":
        o = softmax_attention(q, k, v, segments, scale, HEADS_FIRST)
    else:
        logits = _block_logits(q, k, segments, scale, HEADS_FIRST, 0, T)
        weights = ATTENTION_ACTIVATIONS[activation](logits, eps).astype(v.dtype)
        o = checkpoint_name(contract("bkgqs,bksd->bkgqd", weights, v).astype(v.dtype), "attended")
    return jnp.transpose(o, (0, 3, 1, 2, 4)).reshape(b, T, h, D)


def _named(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Names for rematerialization, in the layout in which attention's gradient reads them."""
    return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")


def contract(equation: str, a: Array, b: Array) -> Array:
    """einsum of two activations with a float32 result. In its gradient, too, the factors have the compute dtype."""
    dims_a, dims_b, dims_out = equation.replace("->", ",").split(",")
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    @jax.custom_gradient
    def product(a: Array, b: Array) -> Any:
        def backward(grad: Array) -> tuple[Array, Array]:
            grad = grad.astype(a.dtype)
            grad_a = einsum(f"{dims_out},{dims_b}->{dims_a}", grad, b)
            grad_b = einsum(f"{dims_a},{dims_out}->{dims_b}", a, grad)
            return grad_a.astype(a.dtype), grad_b.astype(b.dtype)

        return einsum(equation, a, b), backward

    return product(a, b)


def _readable(first: int, n: int, m: int, segments: Segments) -> Bool[Array, "_ 1 1 n m"]:
    """Which of keys 0 ... m - 1 the queries first ... first + n - 1 may read: no later ones, and only of their own segment."""
    causal = (first + jnp.arange(n)[:, None] >= jnp.arange(m)[None])[None, None, None]
    if segments is None:
        return causal
    same = segments[:, first : first + n, None] == segments[:, None, :m]
    return causal & same[:, None, None]


def _query_blocks(T: int) -> list[tuple[int, int]]:
    """Bounds of blocks of queries. A block reads no keys beyond its end, so most of the masked half is never computed.

    Each block is compiled by itself. At 256 positions 4 blocks instead of 2 make no step of small faster on a CPU, but its
    compilation takes 12.4 instead of 6.8 s.
    """
    n = next(n for n, least in ((4, 128), (2, 64), (1, 0)) if T % n == 0 and T // n >= least)
    return [(i * T // n, (i + 1) * T // n) for i in range(n)]


def _softmax_forward(
    q: Array, k: Array, v: Array, segments: Segments, scale: float, layout: Layout
) -> tuple[Array, tuple[Any, ...]]:
    outs, norms, axis = [], [], layout.q.index("q")
    _, to_queries, _ = layout.products
    for first, last in layout.query_blocks(q.shape[axis]):
        logits = _block_logits(q, k, segments, scale, layout, first, last)
        top = jnp.max(logits, axis=-1, keepdims=True)
        power = jnp.exp(logits - top)
        total = jnp.sum(power, axis=-1, keepdims=True)
        o = contract(to_queries, power.astype(v.dtype), layout.keys(v, last))
        outs.append((o / layout.as_queries(total)).astype(v.dtype))
        norms.append(top + jnp.log(total))
    o, norm = jnp.concatenate(outs, axis), jnp.concatenate(norms, axis=-2)
    o, norm = checkpoint_name(o, "attended"), checkpoint_name(norm, "attended")
    return o, (q, k, v, segments, o, norm)


def _softmax_backward(scale: float, layout: Layout, saved: tuple[Any, ...], grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, o, norm = saved
    query_axis, key_axis = layout.q.index("q"), layout.kv.index("s")
    n = q.shape[query_axis]
    to_logits, to_queries, to_keys = layout.products
    inner = layout.as_logits(jnp.sum(grad.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True))
    grads_q, grad_k, grad_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for first, last in layout.query_blocks(n):
        q_rows, grad_rows = layout.queries(q, first, last), layout.queries(grad, first, last)
        p = jnp.exp(_block_logits(q, k, segments, scale, layout, first, last) - norm[..., first:last, :])
        grad_p = contract(to_logits, grad_rows, layout.keys(v, last))
        grad_s = (scale * p * (grad_p - inner[..., first:last, :])).astype(q.dtype)
        grads_q.append(contract(to_queries, grad_s, layout.keys(k, last)).astype(q.dtype))
        later = [(0, n - last if axis == key_axis else 0) for axis in range(k.ndim)]
        grad_k += jnp.pad(contract(to_keys, grad_s, q_rows), later)
        grad_v += jnp.pad(contract(to_keys, p.astype(v.dtype), grad_rows), later)
    return jnp.concatenate(grads_q, query_axis), grad_k.astype(k.dtype), grad_v.astype(v.dtype), None


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def softmax_attention(
    q: Float[Array, "..."], k: Float[Array, "..."], v: Float[Array, "..."], segments: Segments, scale: float, layout: Layout
) -> Float[Array, "..."]:
    """Causal softmax attention whose backward pass recomputes the weights from their log-normalizer, as in FlashAttention
    (Dao et al., arXiv 2205.14135): nothing of size T x T is saved.

    q and the result have the dims layout.q, k and v the dims layout.kv; segments are [b T]."""
    return _softmax_forward(q, k, v, segments, scale, layout)[0]


softmax_attention.defvjp(_softmax_forward, _softmax_backward)


def _block_logits(
    q: Array, k: Array, segments: Segments, scale: float, layout: Layout, first: int, last: int
) -> Float[Array, "..."]:
    """Logits of queries first ... last - 1 and keys 0 ... last - 1."""
    queries, keys = layout.queries(q, first, last), layout.keys(k, last)
    logits = scale * contract(layout.products[0], queries, keys)
    readable = _readable(first, last - first, last, segments)
    return jnp.where(readable if "g" in layout.q else readable[:, 0], logits, MASKED)


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
def splash_attention(
    q: Float[Array, "b h T D"], k: Float[Array, "b k T D"], v: Float[Array, "b k T D"], segments: Segments, interpret: bool
) -> Float[Array, "b h T D"]:
    """JAX's splash attention for a TPU; its gradient is its own, and what it saves for the backward pass is of size T.

    Its kernels have no VMA annotations, which shard_map's check needs. So the kernels alone are traced without the check, forward
    and backward; everything else, collectives above all, is checked. q, k and v must vary over the same mesh axes, and q is
    scaled already. interpret: without the kernel compiler, slowly, for a CPU.
    """
    return _splash_forward(q, k, v, segments, interpret)[0]


splash_attention.defvjp(_splash_forward, _splash_backward)


def _splash(q: Array, k: Array, v: Array, segments: Array | None, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # importing takes a second

    _, h, T, _ = q.shape
    block = next(n for n in range(min(BLOCK, T), 0, -SPLASH_MULTIPLE) if T % n == 0)
    # The gradient of q by one kernel, those of k and v by another. The fused kernel computes the logits one time less, but writes
    # a rounded part of q's gradient for each block of keys; as XLA compiles the sum of these parts, it costs more than it saves.
    keys = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel: Any = library.make_splash_mha(
        library.MultiHeadMask([library.CausalMask((T, T))] * h),
        block_sizes=library.BlockSizes(**dict.fromkeys(keys, block)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )
    with jax.named_scope("splash_attention"):
        ids = None if segments is None else library.SegmentIds(segments, segments)
        return jax.vmap(kernel)(q, k, v, ids)


def attention_logits(q: Float[Array, "b T h D"], k: Float[Array, "b T k D"], scale: float) -> Float[Array, "b k g n"]:
    """The arguments of softmax for the n = T (T + 1) / 2 pairs of query and key that the causal mask allows. For inspection:
    attention itself saves nothing of that size."""
    b, T, h, D = q.shape
    n_kv = k.shape[2]
    logits = scale * contract("btkgd,bskd->bkgts", q.reshape(b, T, n_kv, h // n_kv, D), k)
    query, key = jnp.tril_indices(T)
    return logits[..., query, key]


def attention_mean_square(q: Float[Array, "b T h D"], k: Float[Array, "b T k D"], scale: float) -> Float[Array, ""]:
    """The mean square of `attention_logits`, of which a block of queries exists at a time."""
    b, T, h, D = q.shape
    n_kv = k.shape[2]
    q, k = jnp.transpose(q.reshape(b, T, n_kv, h // n_kv, D), (0, 2, 3, 1, 4)), jnp.transpose(k, (0, 2, 1, 3))
    step = next(n for n in (BLOCK, 256, 128, 64, T) if T % n == 0)
    total = jnp.zeros((), jnp.float32)
    for first in range(0, T, step):
        logits = scale * contract("bkgqd,bksd->bkgqs", q[:, :, :, first : first + step], k[:, :, : first + step])
        total += jnp.sum(jnp.where(_readable(first, step, first + step, None), jnp.square(logits), 0))
    return total / (b * h * (T * (T + 1) // 2))
