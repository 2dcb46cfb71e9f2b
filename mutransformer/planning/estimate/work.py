"""What the train step does on one device, counted in the jaxpr of the function that training runs. No device, no compiler.

A jaxpr does not show what the compiler fuses. Assumed here: matrix products, collectives, reductions, gathers and loops write
their results to memory, and everything between them is fused into the equations that read it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.extend import core

from mutransformer.config.schema import Config
from mutransformer.data.batches.rows import Batch
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.training.program import Program
from mutransformer.training.step import make_loss_and_grads

# JAX's primitives by XLA's name of the collective.
COLLECTIVES = {
    **dict.fromkeys(("all_gather", "all_gather_invariant", "all_gather_reduced"), "all-gather"),
    **dict.fromkeys(("reduce_scatter", "unreduced_reduce_scatter"), "reduce-scatter"),
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin", "unreduced_psum"), "all-reduce"),
    "ppermute": "collective-permute",
    "all_to_all": "all-to-all",
}
LOOPS = {"scan", "while", "cond"}
WRITERS = {"dot_general", "conv_general_dilated", "gather", "pallas_call", "dynamic_update_slice", "sort", "cumsum", "cummax"}
WRITERS |= set(COLLECTIVES)
CUDNN = {"dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"}
WRITERS |= CUDNN

# In the innermost loop the compiler was seen to hold 1.6 to 2.2 times the bytes counted here: float32 copies, prefetches.
COPIES = 2.0

_CUDNN_VERSION = 90100

CollectiveKind = tuple[str, tuple[str, ...]]  # XLA's name, and the mesh axes that it runs over


@dataclass
class Work:
    """What one device does in a step. Memory is that held at the moment of peak memory."""

    matmul_flops: float = 0.0  # recomputation included, kernels excluded
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0  # read and written
    kept_bytes: float = 0.0  # activations kept for the backward pass and gradients
    working_bytes: float = 0.0  # the working set of a layer, or of another innermost loop
    count: Counter[CollectiveKind] = field(default_factory=Counter)
    bytes: Counter[CollectiveKind] = field(default_factory=Counter)  # of the full arrays, gathered or not yet reduced
    unknown_kernels: set[str] = field(default_factory=set)  # whose FLOPs are unknown

    def add(self, other: "Work", times: int) -> None:
        """Adds another computation, run several times. Memory held is not a sum and stays."""
        self.matmul_flops += times * other.matmul_flops
        self.kernel_flops += times * other.kernel_flops
        self.hbm_bytes += times * other.hbm_bytes
        for total, more in ((self.count, other.count), (self.bytes, other.bytes)):
            total.update({kind: times * n for kind, n in more.items()})
        self.unknown_kernels |= other.unknown_kernels


def abstract_batch(config: Config) -> Batch:
    """Shapes and dtypes of a global batch."""
    size = (config.data.batch_size, config.data.seq_len)
    segments = jax.ShapeDtypeStruct(size, jnp.int32) if config.data.intra_document_mask else None
    return Batch(jax.ShapeDtypeStruct(size, jnp.int32), jax.ShapeDtypeStruct(size, jnp.bool_), segments)


def count_step(program: Program, kernels: KernelFlops) -> Work:
    """Loss and gradients of one step on one device, without the optimizer's update.

    Layers count as a loop even where they are unrolled. That is the same work, and what a loop keeps for the backward pass shows
    in its jaxpr; without it the residual stream would count as fused into its readers, down to the first layer.
    """
    program = replace(program, forward=replace(program.forward, execution=replace(program.execution, unroll_layers=False)))
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), program.state.params)
    # JAX asks for the version of cuDNN before it traces cuDNN's attention, which needs no cuDNN to be traced and counted.
    with mock.patch.object(cudnn, "check_cudnn_version", lambda: _CUDNN_VERSION):
        traced = jax.make_jaxpr(make_loss_and_grads(program))(params, abstract_batch(program.config))
    return count(traced.jaxpr, kernels)


def count(jaxpr: core.Jaxpr, kernels: KernelFlops) -> Work:
    """The work of a jaxpr whose shapes are per device. The few operations outside of shard_map are negligible."""
    counter = _Counter(kernels)
    inputs = [_Value.stored(v) for v in (*jaxpr.invars, *jaxpr.constvars)]
    return counter.finish(counter.run(jaxpr, inputs), inputs)


@dataclass(eq=False)
class _Value:
    """A value of a jaxpr: an array in memory, or something fused into its readers.

    An array is live between the equations `written` (-1 for inputs and fused values) and `last_read`.
    """

    bytes: float
    sources: dict["_Value", float] = field(default_factory=dict)  # arrays read to have it, and bytes read; an array: itself
    written: int = -1
    last_read: int = -1

    @classmethod
    def stored(cls, v: Any, at: int = -1) -> "_Value":
        """An array in memory, written by the equation at an index."""
        value = cls(_bytes(v), written=at, last_read=at)
        value.sources[value] = value.bytes
        return value


def _shape(v: Any) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def _bytes(v: Any) -> float:
    return float(math.prod(v.aval.shape) * v.aval.dtype.itemsize) if hasattr(v.aval, "shape") else 0.0


def _merged_sources(values: Iterable[_Value]) -> dict[_Value, float]:
    merged: dict[_Value, float] = {}
    for value in values:
        for source, size in value.sources.items():
            merged[source] = max(size, merged.get(source, 0.0))
    return merged


class _Counter:
    """Counts the work of one jaxpr, equation by equation, with calls inlined. `at` is the index of the current equation."""

    def __init__(self, kernels: KernelFlops) -> None:
        self.kernels, self.work, self.at = kernels, Work(), 0
        self.arrays: list[_Value] = []  # written here
        self.loops: dict[int, tuple[str, Work]] = {}  # by index: the primitive, and the work of one round

    def run(self, jaxpr: core.Jaxpr, inputs: list[_Value]) -> list[_Value]:
        """Counts the equations, given arguments and then constants. Returns the outputs."""
        env: dict[Any, _Value] = dict(zip((*jaxpr.invars, *jaxpr.constvars), inputs, strict=True))

        def look_up(v: Any) -> _Value:
            return _Value(_bytes(v)) if isinstance(v, core.Literal) else env[v]

        for eqn in jaxpr.eqns:
            values, name = list(map(look_up, eqn.invars)), eqn.primitive.name
            inner = None if name in LOOPS or name == "pallas_call" else next(_inner_jaxprs(eqn), None)
            if inner is not None and len(inner.invars) == len(values):
                outputs = self.run(inner, values + [_Value(_bytes(v)) for v in inner.constvars])
            else:
                outputs = self._equation(eqn, values)
                self.at += 1
            env.update(zip(eqn.outvars, outputs, strict=True))
        return list(map(look_up, jaxpr.outvars))

    def finish(self, outputs: list[_Value], inputs: list[_Value]) -> Work:
        """Stores outputs that were fused so far, and finds the peak of memory."""
        for value in dict.fromkeys(outputs):
            if value.written == -1 and value not in inputs:
                self.work.hbm_bytes += self._read([value]) + value.bytes
                value.written = self.at
                self.arrays.append(value)
            value.last_read = self.at
        change = [0.0] * (self.at + 2)
        for value in self.arrays:
            change[value.written] += value.bytes
            change[value.last_read + 1] -= value.bytes
        innermost = all(name == "cond" for name, _ in self.loops.values())
        held: list[tuple[float, float]] = []
        for at, live in enumerate(itertools.accumulate(change[:-1])):
            _, body = self.loops.get(at, ("", Work()))
            kept, working = (0.0, COPIES * live) if innermost else (live, 0.0)
            held.append((kept + body.kept_bytes, working + body.working_bytes))
        self.work.kept_bytes, self.work.working_bytes = max(held, key=sum)
        return self.work

    def _equation(self, eqn: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name in LOOPS:
            bodies = [count(each, self.kernels) for each in _inner_jaxprs(eqn)]  # several: branches; the costliest counts
            body = max(bodies, key=lambda each: (each.matmul_flops + each.kernel_flops, each.hbm_bytes))
            self.work.add(body, eqn.params["length"] if name == "scan" else 1)  # a while has no known count
            self.loops[self.at] = name, body
            self._read(values)
            return self._write(eqn.outvars)
        if name in WRITERS or name.startswith(("reduce_", "scatter", "arg")):
            read, outputs = self._read(values), self._write(eqn.outvars)
            touched = read + sum(output.bytes for output in outputs)
            if name in ("gather", "dynamic_update_slice"):  # reads and writes only the selected part
                update = values[1:2] if name == "dynamic_update_slice" else []
                touched = 2 * min(value.bytes for value in (*outputs, *update))
            self.work.hbm_bytes += touched
            self._flops_and_collectives(eqn)
            return outputs
        if name == "optimization_barrier":
            return [_Value(value.bytes, value.sources) for value in values]
        sources = _merged_sources(values)
        if name in ("slice", "dynamic_slice") and values[0].bytes:
            sources = {source: size * _bytes(eqn.outvars[0]) / values[0].bytes for source, size in sources.items()}
        return [_Value(_bytes(v), sources) for v in eqn.outvars]

    def _read(self, values: Iterable[_Value]) -> float:
        """Reads all that the values depend on. Returns bytes."""
        sources = _merged_sources(values)
        for source in sources:
            source.last_read = self.at
        return sum(sources.values())

    def _write(self, variables: Iterable[Any]) -> list[_Value]:
        written = [_Value.stored(v, self.at) for v in variables]
        self.arrays += written
        return written

    def _flops_and_collectives(self, eqn: core.JaxprEqn) -> None:
        name, params, work = eqn.primitive.name, eqn.params, self.work
        shapes, results = ([_shape(v) for v in each] for each in (eqn.invars, eqn.outvars))
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            work.matmul_flops += 2.0 * math.prod(results[0]) * math.prod(shapes[0][d] for d in contracted)
        elif name == "pallas_call" or name in CUDNN:
            kernel = str(params.get("name")) if name == "pallas_call" else name
            flops = self.kernels.of_call(kernel, shapes, results, str(params.get("metadata")))
            work.kernel_flops += flops or 0.0
            work.unknown_kernels |= {kernel} if flops is None else set()
        elif name in COLLECTIVES:
            axes = params.get("axes", params.get("axis_name"))
            kind = COLLECTIVES[name], tuple(map(str, axes if isinstance(axes, tuple) else (axes,)))
            for before, after in zip(eqn.invars, eqn.outvars, strict=True):
                work.count[kind] += 1
                work.bytes[kind] += int(_bytes(after if kind[0] == "all-gather" else before))


def _inner_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """A called function, a loop's body, or the branches of a cond."""
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.Jaxpr | core.ClosedJaxpr):
                yield each.jaxpr if isinstance(each, core.ClosedJaxpr) else each
