"""What the train step does on one device, counted from the trace of the very function that will run. No device, no compiler.

A trace knows nothing of the compiler's fusions. Here matrix products, collectives, reductions, gathers and loops write their
results to memory; everything between them is taken to be computed on the way, by whoever reads it.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh

from mutransformer.config.schema import Config
from mutransformer.data.batches.batch import Batch
from mutransformer.model.transformer import specs
from mutransformer.planning.kernels import Kernels
from mutransformer.training.step import make_loss_and_grads

# Primitives by what they move; the name in XLA's text.
COLLECTIVES = {
    **dict.fromkeys(("all_gather", "all_gather_invariant", "all_gather_reduced"), "all-gather"),
    **dict.fromkeys(("reduce_scatter", "unreduced_reduce_scatter"), "reduce-scatter"),
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin", "unreduced_psum"), "all-reduce"),
    "ppermute": "collective-permute",
    "all_to_all": "all-to-all",
}
LOOPS = {"scan", "while", "cond"}
WRITERS = {"dot_general", "conv_general_dilated", "gather", "pallas_call", "dynamic_update_slice", "sort", "cumsum", "cummax"}
SLICES = {"slice", "dynamic_slice"}


# In the innermost loop the compiler was seen to hold 1.6 to 2.2 times what is counted here: float32 forms, copies, prefetches.
COPIES = 2.0


class Move(NamedTuple):
    """A kind of collective: over which axes of the mesh."""

    kind: str
    axes: tuple[str, ...]


@dataclass
class Work:
    """What a device does in a step.

    Attributes:
        flops: of matrix products, recomputation included; those of Pallas kernels apart.
        hbm_bytes: read and written.
        kept_bytes: when most is held, beyond what the step is given: activations for the backward pass, gradients.
        working_bytes: at the same time: of a layer in work, or whatever else the innermost loop is over.
        count: of collectives.
        bytes: of them: of the whole array, gathered or not yet reduced, on one device.
        unknown: names of Pallas kernels of which nothing is known.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    kept_bytes: float = 0.0
    working_bytes: float = 0.0
    count: Counter[Move] = field(default_factory=Counter)
    bytes: Counter[Move] = field(default_factory=Counter)
    unknown: set[str] = field(default_factory=set)

    def add(self, other: "Work", times: int) -> None:
        """All but what is held."""
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        self.hbm_bytes += times * other.hbm_bytes
        for mine, theirs in ((self.count, other.count), (self.bytes, other.bytes)):
            mine.update({move: times * n for move, n in theirs.items()})
        self.unknown |= other.unknown


def abstract_batch(config: Config) -> Batch:
    """Shapes of a batch."""
    size = (config.data.batch_size, config.data.seq_len)
    segments = jax.ShapeDtypeStruct(size, jnp.int32) if config.data.intra_document_mask else None
    return Batch(jax.ShapeDtypeStruct(size, jnp.int32), jax.ShapeDtypeStruct(size, jnp.bool_), segments)


def work(config: Config, mesh: AbstractMesh, kernels: Kernels) -> Work:
    """Loss and gradients of one step on one device; the optimizer's update is not in it."""
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), specs(config))
    traced = jax.make_jaxpr(make_loss_and_grads(config, mesh, bos_id=0))(params, abstract_batch(config))
    return count(traced.jaxpr, kernels)


class Node(NamedTuple):
    """An equation, with variables by number."""

    name: str
    params: dict[str, Any]
    ins: list[int]
    outs: list[int]


class Program:
    """The equations of a jaxpr in one row, calls opened up."""

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        self.avals: list[Any] = []
        self.inputs = [self.new(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)]
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), self.inputs, strict=True))
        self.nodes = list(self._flat(jaxpr, env))
        self.outputs = [self._number(v, env) for v in jaxpr.outvars]

    def new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def bytes(self, i: int) -> float:
        aval = self.avals[i]
        return float(math.prod(aval.shape) * aval.dtype.itemsize) if hasattr(aval, "shape") else 0.0

    def _number(self, v: Any, env: dict[Any, int]) -> int:
        return self.new(v.aval) if isinstance(v, core.Literal) else env[v]

    def _flat(self, jaxpr: core.Jaxpr, env: dict[Any, int]) -> Iterator[Node]:
        for eqn in jaxpr.eqns:
            name, ins = eqn.primitive.name, [self._number(v, env) for v in eqn.invars]
            inner = next(_jaxprs(eqn.params), None) if name not in LOOPS and name != "pallas_call" else None
            if inner is None or len(inner.invars) != len(ins):
                outs = [self.new(v.aval) for v in eqn.outvars]
                yield Node(name, eqn.params, ins, outs)
            else:
                scope = dict(zip(inner.invars, ins, strict=True)) | {v: self.new(v.aval) for v in inner.constvars}
                yield from self._flat(inner, scope)
                outs = [self._number(v, scope) for v in inner.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def count(jaxpr: core.Jaxpr, kernels: Kernels) -> Work:
    """The work of a jaxpr in which shapes are a device's own (or, outside of shard_map, which is opened up, unimportant)."""
    program, total = Program(jaxpr), Work()
    # By number: which arrays in memory a value is read from, and how many bytes of each.
    reads: dict[int, dict[int, float]] = {i: {i: program.bytes(i)} for i in program.inputs}
    born: dict[int, int] = {}
    last: dict[int, int] = {}
    loops: dict[int, Work] = {}

    def read(values: list[int], at: int) -> float:
        sources: dict[int, float] = {}
        for value in values:
            for source, size in reads.get(value, {}).items():
                sources[source] = max(size, sources.get(source, 0.0))
        last.update(dict.fromkeys(sources, at))
        return sum(sources.values())

    def write(values: list[int], at: int) -> float:
        for value in values:
            reads[value], born[value] = {value: program.bytes(value)}, at
        return sum(program.bytes(value) for value in values)

    for at, node in enumerate(program.nodes):
        if node.name in LOOPS:
            body, times = _body(node, kernels)
            total.add(body, times)
            loops[at] = body
            read(node.ins, at)
            write(node.outs, at)
        elif node.name in COLLECTIVES or node.name in WRITERS or node.name.startswith(("reduce_", "scatter", "arg")):
            taken, given = read(node.ins, at), write(node.outs, at)
            if node.name in ("gather", "dynamic_update_slice"):  # touches only what it picks
                taken = given = min(program.bytes(i) for i in (*node.outs, *(node.ins[1:2] if node.name[0] == "d" else ())))
            total.hbm_bytes += taken + given
            _tally(node, program, total, kernels)
        elif node.name == "optimization_barrier":
            reads.update({o: reads.get(i, {}) for i, o in zip(node.ins, node.outs, strict=True)})
        else:
            merged: dict[int, float] = {}
            for value in node.ins:
                for source, size in reads.get(value, {}).items():
                    merged[source] = max(size, merged.get(source, 0.0))
            if node.name in SLICES and (whole := program.bytes(node.ins[0])):
                merged = {source: size * program.bytes(node.outs[0]) / whole for source, size in merged.items()}
            reads.update(dict.fromkeys(node.outs, merged))

    end = len(program.nodes)
    for value in dict.fromkeys(program.outputs):
        if value not in born and value not in program.inputs:
            total.hbm_bytes += read([value], end) + write([value], end)
        last[value] = end
    _hold(total, program, born, last, loops)
    return total


def _hold(total: Work, program: Program, born: dict[int, int], last: dict[int, int], loops: dict[int, Work]) -> None:
    """Fills in what is held: an array from the node that writes it to the last that reads it."""
    end = len(program.nodes)
    change = [0.0] * (end + 2)
    for value, at in born.items():
        change[at] += program.bytes(value)
        change[last.get(value, at) + 1] -= program.bytes(value)
    live, innermost = 0.0, all(program.nodes[at].name == "cond" for at in loops)
    for at in range(end + 1):
        live += change[at]
        body = loops.get(at, Work())
        kept, working = (0.0, COPIES * live) if innermost else (live, 0.0)
        kept, working = kept + body.kept_bytes, working + body.working_bytes
        if kept + working > total.kept_bytes + total.working_bytes:
            total.kept_bytes, total.working_bytes = kept, working


def _body(node: Node, kernels: Kernels) -> tuple[Work, int]:
    """What a loop does in one round, and how many rounds. Of branches the longest is taken; a while without a count runs once."""
    bodies = [count(each, kernels) for each in _jaxprs(node.params)]
    longest = max(bodies, key=lambda each: (each.flops + each.kernel_flops, each.hbm_bytes))
    return longest, node.params["length"] if node.name == "scan" else 1


def _tally(node: Node, program: Program, total: Work, kernels: Kernels) -> None:
    shapes: list[tuple[int, ...]] = [getattr(program.avals[i], "shape", ()) for i in node.ins]
    if node.name == "dot_general":
        (contracted, _), _ = node.params["dimension_numbers"]
        total.flops += 2.0 * math.prod(program.avals[node.outs[0]].shape) * math.prod(shapes[0][d] for d in contracted)
    elif node.name == "pallas_call":
        name, results = str(node.params.get("name")), [program.avals[i].shape for i in node.outs]
        flops = kernels.flops_of(name, shapes, results, str(node.params.get("metadata")))
        total.kernel_flops += flops or 0.0
        total.unknown |= {name} if flops is None else set()
    elif node.name in COLLECTIVES:
        kind = COLLECTIVES[node.name]
        axes = node.params.get("axes", node.params.get("axis_name"))
        move = Move(kind, tuple(str(axis) for axis in (axes if isinstance(axes, tuple) else (axes,))))
        for taken, given in zip(node.ins, node.outs, strict=True):
            total.count[move] += 1
            total.bytes[move] += int(program.bytes(given if kind == "all-gather" else taken))
