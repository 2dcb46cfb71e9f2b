"""`build`: the one place where anything is derived from a config. Everything else takes the `Program`, or values in it.

Also what a run carries from step to step: the state, its initial values, and its abstract form with shardings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from mutransformer import mup
from mutransformer.config.run import BadStepsConfig
from mutransformer.config.schema import Config, ModelConfig
from mutransformer.data.cache.dataset import Corpus
from mutransformer.data.cache.prepare import prepare, prepare_tokenizer
from mutransformer.data.tokenizers.tokenizer import Tokenizer
from mutransformer.errors import check
from mutransformer.model import execution
from mutransformer.model.execution import Execution
from mutransformer.model.matmul import MatmulPolicy
from mutransformer.model.transformer import Forward
from mutransformer.model.weights import Transformer, block_specs, flops_per_token, transformer_specs
from mutransformer.sharding.mesh import AnyMesh, batch_pspec, first_device, make_mesh, n_row_groups, replicated
from mutransformer.sharding.processes import all_processes, assert_equal_across_processes
from mutransformer.sharding.spec import Weight
from mutransformer.training.bad_steps import Recent, no_steps
from mutransformer.training.optim import Optimizer, make_schedule

T = TypeVar("T")  # Array, ShapeDtypeStruct, NamedSharding


class TrainState(eqx.Module, Generic[T]):
    step: T  # int32 scalar, updates completed
    params: Transformer[T]  # float32 master weights
    opt: optax.OptState  # the optimizer's state; moments are sharded like their weights
    recent: Recent[T] | None = None  # with bad_steps.spike


class Vocabulary(NamedTuple):
    """The number of a tokenizer's ids, the id that begins a row, and the id that ends a document."""

    n_vocab: int
    bos_id: int = 0
    eos_id: int = 0


@dataclass(frozen=True)
class Program:
    """What a run is, resolved for the devices it runs on. `print(program)` gives a short table."""

    config: Config  # with the size of the vocabulary and the compute dtype filled in
    vocabulary: Vocabulary
    mesh: Any  # a Mesh, or an AbstractMesh in planning
    scaling: mup.Scaling  # the parametrization and the size of the model relative to the one that was tuned
    forward: Forward  # the model: specs of its weights, its mathematics, and the resolved execution settings
    optimizer: Optimizer
    state: TrainState[jax.ShapeDtypeStruct]  # abstract, with shardings: what a checkpoint is restored into

    @property
    def specs(self) -> Transformer[Weight]:
        return self.forward.specs

    @property
    def execution(self) -> Execution:
        return self.forward.execution

    @property
    def bos_id(self) -> int:
        return self.vocabulary.bos_id

    @property
    def batch_pspec(self) -> PartitionSpec:
        return batch_pspec(self.mesh)

    @cached_property
    def state_shardings(self) -> TrainState[NamedSharding]:
        return jax.tree.map(lambda a: a.sharding, self.state)

    @cached_property
    def n_params(self) -> int:
        return sum(w.size for w in jax.tree.leaves(self.specs))

    @cached_property
    def flops_per_token(self) -> float:
        """Of the model, forward and backward, by the convention of model.weights.flops_per_token."""
        return flops_per_token(self.specs, self.config.model, self.config.data.seq_len)

    def init_state(self) -> TrainState[Array]:
        """The state before the first update, computed in place: bit for bit the same on every mesh."""
        init = partial(initial_state, self.optimizer, self.config.seed, self.config.bad_steps)
        return jax.jit(init, out_shardings=self.state_shardings, compiler_options=dict(self.execution.other_options))()

    def __str__(self) -> str:
        c, e = self.config, self.execution
        in_layers = sum(w.size for w in jax.tree.leaves(self.specs.blocks))
        shape = " x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        rows = {
            "devices": f"{self.mesh.size} x {e.device_kind}, mesh {shape}",
            "model": f"width {c.model.d_model}, {c.model.n_layer} layers, {self.n_params:,} parameters ({in_layers:,} in layers)",
            "rule": f"{c.optim.rule}, {c.optim.name}, learning rate {c.optim.lr:g} at width {c.model.d_base}",
            "batch": f"{c.data.batch_size} rows of {c.data.seq_len} tokens, {e.microbatches} microbatch(es)",
            "precision": f"compute {c.precision.compute}, gradient sums {c.precision.grad_reduce_dtype}, weights float32",
            "execution": f"attention {e.attention}, remat {e.remat}, head chunk {e.head_chunk}, overlap groups {e.overlap_groups}"
            + (", all-to-all over y" if e.via_all_to_all else "")
            + (", unrolled layers" if e.unroll_layers else ""),
        }
        if e.compiler_options:
            rows["XLA options"] = " ".join(f"{name}={value}" for name, value in e.compiler_options.items())
        return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def build(
    config: Config, devices: Sequence[Any] | Mesh | AbstractMesh | None = None, vocabulary: Tokenizer | Vocabulary | None = None
) -> Program:
    """Resolves a config for devices.

    Args:
        devices: to compute on (None: all that JAX sees); or a mesh of them; or an abstract mesh to plan for.
        vocabulary: a tokenizer, or its numbers. None: the tokenizer that the config names is opened, and trained if need be.

    Raises:
        ConfigError: the mesh does not fit the devices, cannot divide the model or the batch, or lacks the attention kernel that
            the config names; the vocabulary does not fit model.n_vocab.
    """
    mesh: AnyMesh = devices if isinstance(devices, Mesh | AbstractMesh) else make_mesh(config.mesh, devices)
    found = prepare_tokenizer(config.data) if vocabulary is None else vocabulary
    config = execution.with_compute(config.with_vocab(found.n_vocab), first_device(mesh))
    _check_divides(config, mesh)
    scaling = scaling_of(config)
    specs = transformer_specs(config.model, mesh.shape["y"])
    settings = execution.resolve(config, mesh)
    optimizer = Optimizer(config.optim, config.precision.mu_dtype, specs, scaling, make_schedule(config.optim, config.steps))
    forward = Forward(
        c=config.model,
        specs=specs,
        block_specs=block_specs(config.model, mesh.shape["y"]),
        multipliers=_multipliers(config.model, specs, scaling),
        policy=MatmulPolicy(config.precision.compute, config.precision.grad_reduce_dtype, settings.platform == "cpu"),
        execution=settings,
        z_loss=config.optim.z_loss,
    )
    state = abstract_state(optimizer, mesh, config.bad_steps)
    return Program(config, Vocabulary(found.n_vocab, found.bos_id, found.eos_id), mesh, scaling, forward, optimizer, state)


def _multipliers(m: ModelConfig, specs: Transformer[Weight], scaling: mup.Scaling) -> Transformer[float]:
    """The factor on each weight's output in the forward pass: the parametrization's, and the config's own constant."""
    own = {"input": m.embed_multiplier, "residual": m.residual_multiplier, "output": m.logits_multiplier}
    return jax.tree.map(lambda w: own.get(w.role, 1.0) * mup.forward_multiplier(w, scaling), specs)


def initial_state(optimizer: Optimizer, seed: Int[Array, ""] | int, bad_steps: BadStepsConfig) -> TrainState[Array]:
    """The state before the first update, with no sharding of its own. seed: may be an array."""
    params = mup.init_weights(optimizer.specs, optimizer.scaling, seed)
    opt = optimizer.transformation().init(params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt=opt, recent=no_steps(bad_steps))


def abstract_state(optimizer: Optimizer, mesh: AnyMesh, bad_steps: BadStepsConfig) -> TrainState[jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the whole state: what a checkpoint is restored into. Computes nothing."""
    shapes = jax.eval_shape(lambda: initial_state(optimizer, 0, bad_steps))
    params: Any = jax.tree.map(lambda w: NamedSharding(mesh, w.pspec), optimizer.specs)

    def moments_or_scalar(node: Any) -> Any:
        """Moments are trees of weights, sharded like these; None where another optimizer trains the weight."""
        if not isinstance(node, Transformer):
            return replicated(mesh)
        return jax.tree.map(lambda m, s: None if m is None else s, node, params, is_leaf=lambda m: m is None)

    # jit of the optimizer's init alone would drop the moments' shardings: they are given, not propagated.
    opt = jax.tree.map(moments_or_scalar, shapes.opt, is_leaf=lambda node: isinstance(node, Transformer))
    recent = jax.tree.map(lambda _: replicated(mesh), shapes.recent)
    sharded = TrainState(step=replicated(mesh), params=params, opt=opt, recent=recent)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, sharded)


def prepare_data(config: Config) -> Corpus:
    """The tokenized data of a config, prepared if need be by all processes of the run.

    Raises ConfigError as prepare raises, or if processes of the run have different data.
    """
    corpus = prepare(config.data, all_processes())
    assert_equal_across_processes("data", corpus.fingerprints)
    return corpus


def build_with_data(config: Config) -> tuple[Program, Corpus]:
    """The program of a config on all devices, and its tokenized data. Raises ConfigError as build and prepare_data raise."""
    mesh = make_mesh(config.mesh)  # before text is tokenized: a mesh that does not fit is reported at once
    corpus = prepare_data(config)
    program = build(config, mesh, corpus.tokenizer)
    # auto depends on the CPU of a host
    assert_equal_across_processes("the resolved configuration", {"precision.compute": program.config.precision.compute})
    return program, corpus


def scaling_of(config: Config) -> mup.Scaling:
    """The parametrization of a config, and the size of its model relative to the one that was tuned."""
    m, o = config.model, config.optim
    return mup.Scaling(
        rule=o.rule,
        width=m.d_model / m.d_base,
        depth=m.n_layer / (m.n_layer_base or m.n_layer),
        batch=config.batch_ratio,
        tokens=config.tokens_ratio,
        batch_exponent=o.batch_exponent,
        tokens_exponent=o.tokens_exponent,
        depth_alpha=o.depth_alpha,
        lr_factors=mup.LrFactors(o.lr_factors.input, o.lr_factors.hidden, o.output_lr_factor),
        embed_lr_exponent=o.embed_lr_exponent,
        eps_scaling=o.eps_scaling,
        coupled_decay=o.decay == "coupled",
        decay_exponent=o.decay_exponent,
        decay_vectors=o.decay_vectors,
        muon_lr=o.muon_lr if o.name == "muon" else None,
    )


def _check_divides(config: Config, mesh: AnyMesh) -> None:
    """Raises ConfigError, naming the key and what would fit, if the mesh cannot divide the model or the batch."""
    m, d, steps = config.model, config.data, config.optim.grad_accumulation_steps or 1
    x, y, groups = mesh.shape["x"], mesh.shape["y"], n_row_groups(mesh)
    batch = f"data.batch_size = {d.batch_size} / optim.grad_accumulation_steps = {steps}: rows at a time"
    at_a_time = d.batch_size // steps
    ratio = "" if m.attention_multiple == 1 else "model.attention_multiple x "
    needs = [
        (batch, at_a_time, "x" if groups == x else "x times mesh.replicas", groups),
        ("model.d_model", m.d_model, "x", x),
        ("model.d_model", m.d_model, "y", y),
        (f"{ratio}model.d_model / model.d_head: heads", m.n_head, "y", y),
        ("feed-forward width model.ff_multiple x model.d_model", m.d_ff, "y", y),
        ("vocabulary padded to model.vocab_multiple", m.padded_vocab, "x", x),
        ("vocabulary padded to model.vocab_multiple", m.padded_vocab, "y", y),
    ]
    if m.kv_heads % y:
        needs.append(("model.d_head (which mesh.y divides if it does not divide model.n_kv_head)", m.d_head, "y", y))
    for what, size, axis, parts in needs:
        check(size % parts == 0, f"{what} = {size}: not divisible by mesh.{axis} = {parts}")
    per_device, overlap = at_a_time // groups, config.mesh.overlap_groups
    check(
        overlap is None or per_device % overlap == 0,
        f"mesh.overlap_groups = {overlap}: must divide the {per_device} rows that a device has at a time",
    )
