"""The simulated step: compiled by the TPU compiler (which needs libtpu, but no TPU), and replayed in time under both costings."""

import importlib.util
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mutransformer.errors import ConfigError, check, translate_errors
from mutransformer.model.weights import attention_flops_per_token
from mutransformer.planning.chips import Topology
from mutransformer.planning.compiled.cost_model import Costing, CostModel
from mutransformer.planning.compiled.hlo import parse
from mutransformer.planning.compiled.replay import COMPUTE, WAITS, Schedule, replay
from mutransformer.planning.estimate.bounds import Scenario, input_bytes
from mutransformer.planning.estimate.work import abstract_batch
from mutransformer.planning.kernel_flops import KernelFlops
from mutransformer.training.program import build
from mutransformer.training.step import make_train_step

COSTINGS: tuple[Costing, ...] = ("hybrid", "cycles")  # the first is the one to quote
ACCURACY = (
    "Simulated from the schedule of the TPU compiler, not measured on hardware. Expect +-15 % where compute bounds the step, "
    "+-30 % or worse where communication is exposed; differences under 5 % are not significant. Pallas kernels are costed at an "
    "assumed fraction of peak."
)


class CompiledStep(NamedTuple):
    """A compiled step."""

    text: str  # scheduled HLO
    seconds: float  # compile time
    memory: dict[str, float]  # bytes on a device: arguments; outputs that do not overwrite these; temporaries; code


def require_compiler() -> None:
    """Raises ConfigError if the TPU compiler is not installed."""
    installed = importlib.util.find_spec("libtpu") is not None
    check(installed, "--compile: needs the TPU compiler (but no TPU): pip install -e '.[tpu]'")


def topology_devices(topology: Topology) -> list[Any]:
    """Devices of a slice, to compile for. Raises ConfigError if the compiler is missing or does not accept the slice."""
    require_compiler()
    # Compile only: do not ask the metadata server, do not claim a chip.
    for key, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on v4 machines; the default for the other chips
    if topology.size == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    with translate_errors(f"--topology {topology}: the TPU compiler does not accept it"):  # of any type: jaxlib's are not public
        return list(topologies.get_topology_desc(str(topology), platform="tpu", **options).devices)


def compile_step(scenario: Scenario) -> CompiledStep:
    """Compiles the step that training would run. Raises ConfigError if that fails, most often for lack of memory."""
    program = build(scenario.config, topology_devices(scenario.topology), scenario.program.vocabulary)
    sharding = NamedSharding(program.mesh, program.batch_pspec)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), abstract_batch(program.config))
    lowered = make_train_step(program).lower(program.state, batch)
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "memory" in line), lines[0])
        raise ConfigError(f"the TPU compiler rejects the step on {scenario.topology}: {reason}") from None
    seconds, analysis = time.perf_counter() - begin, compiled.memory_analysis()
    assert analysis is not None
    memory = {
        "arguments": float(analysis.argument_size_in_bytes),
        "outputs": float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        "temporaries": float(analysis.temp_size_in_bytes),
        "code": float(analysis.generated_code_size_in_bytes),
    }
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    if text is None:
        raise ConfigError("--compile: this libtpu cannot print its schedule; use pip install jax==0.10.2 libtpu==0.0.42")
    return CompiledStep(text, seconds, memory)


class CollectiveKey(NamedTuple):
    """What collectives are grouped by in the totals; n: devices in a group."""

    kind: str
    axes: tuple[str, ...]
    n: int
    is_async: bool


@dataclass
class CollectiveTotals:
    """Sums over the collectives of one key in a step."""

    count: float = 0.0
    bytes: float = 0.0
    wire_bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass(frozen=True)
class Totals:
    """Sums over a step on one device."""

    seconds: float
    by_kind: dict[str, float]  # seconds of spans
    collectives: dict[CollectiveKey, CollectiveTotals]  # the slowest first
    costliest: dict[tuple[str, str], float]  # seconds by kind and op_name, most first
    warnings: list[str]
    compute_seconds: float
    communication_seconds: float  # collectives, exposed or hidden
    exposed_seconds: float  # for which the core waits for collectives


def totals(schedule: Schedule) -> Totals:
    """The totals of a step's schedule."""
    by_kind: dict[str, float] = {kind: 0.0 for kind in (*COMPUTE, *WAITS, "transfer")}
    by_source: defaultdict[tuple[str, str], float] = defaultdict(float)
    collectives: defaultdict[CollectiveKey, CollectiveTotals] = defaultdict(CollectiveTotals)
    warnings: set[str] = set()
    for each, times in schedule.flat():
        warnings |= each.warnings
        for span in each.spans:
            by_kind[span.kind] += times * span.seconds
            by_source[span.kind, span.label] += times * span.seconds
        for c, _, is_async, exposed in each.transfers:
            sums = collectives[CollectiveKey(c.kind, c.axes, c.n, is_async)]
            sums.count += times
            sums.bytes += times * c.bytes
            sums.wire_bytes += times * c.wire_bytes
            sums.seconds += times * c.seconds
            sums.exposed_seconds += times * exposed
    return Totals(
        schedule.seconds,
        by_kind,
        dict(sorted(collectives.items(), key=lambda item: -item[1].seconds)),
        {key: seconds for key, seconds in sorted(by_source.items(), key=lambda item: -item[1]) if seconds},
        sorted(warnings),
        compute_seconds=sum(by_kind[kind] for kind in COMPUTE),
        communication_seconds=sum((sums.seconds for sums in collectives.values()), 0.0),
        exposed_seconds=sum((sums.exposed_seconds for sums in collectives.values()), 0.0),
    )


@dataclass(frozen=True)
class Simulated:
    """A compiled step in time."""

    scenario: Scenario
    schedules: dict[Costing, Schedule]
    totals: dict[Costing, Totals]
    memory: dict[str, float]  # bytes on a device by category; padding: what the step's arguments take beyond their elements
    peak_bytes: float  # of a device, without code, which the compiler counts separately
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of a step, by the costing to quote."""
        return self.totals[COSTINGS[0]].seconds

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.scenario.topology.chip.hbm_bytes

    def mfu(self, costing: Costing) -> dict[str, float]:
        """Model FLOP/s as a fraction of peak, by the conventions of `model_flops`."""
        attainable = self.totals[costing].seconds * self.scenario.topology.chip.peak_flops
        return {name: flops / attainable for name, flops in model_flops(self.scenario).items()}


def simulate(scenario: Scenario, compiled: CompiledStep, kernels: KernelFlops) -> Simulated:
    """Replays a compiled step under both costings."""
    module = parse(compiled.text)
    chip, mesh = scenario.topology.chip, scenario.mesh_sizes
    schedules: dict[Costing, Schedule] = {c: replay(CostModel(module, chip, mesh, c, kernels)) for c in COSTINGS}
    sums: dict[Costing, Totals] = {costing: totals(schedule) for costing, schedule in schedules.items()}
    inputs, sizes = input_bytes(scenario), dict(compiled.memory)
    peak = sum(size for category, size in sizes.items() if category != "code")
    memory = inputs | {"padding": sizes.pop("arguments") - sum(inputs.values())} | sizes
    return Simulated(scenario, schedules, sums, memory, peak, compiled.seconds)


def model_flops(scenario: Scenario) -> dict[str, float]:
    """Model FLOPs of a step on a device, by convention.

    mfu: this project's, `flops_per_token`. mfu_6n: 6 for every parameter, the embedding included, and attention over all
    positions: the convention of published figures of other programs.
    """
    c = scenario.config
    all_weights = 6.0 * scenario.program.n_params + attention_flops_per_token(c.model, c.data.seq_len)
    per_token = {"mfu": scenario.program.flops_per_token, "mfu_6n": all_weights}
    return {name: flops * c.tokens_per_step / scenario.topology.size for name, flops in per_token.items()}
