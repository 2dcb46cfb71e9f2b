"""The real compilers: XLA's for TPUs, which needs libtpu but no TPU, and for GPUs, which needs the CUDA plugin but no GPU."""

import importlib.util
import os
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mutransformer.errors import ConfigError, check, translate_errors
from mutransformer.planning.cards import Card, Cluster
from mutransformer.planning.chips import Slice
from mutransformer.planning.estimate.bounds import Scenario
from mutransformer.planning.estimate.work import abstract_batch
from mutransformer.planning.topology import Topology
from mutransformer.training.program import build
from mutransformer.training.step import make_train_step

# Compile only: do not ask the metadata server, do not claim a chip; do not look for CUDA's driver.
_TPU_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
_GPU_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
# XLA:GPU schedules a step for a memory limit. Near the limit it recomputes values and stops overlapping collectives with
# computation. In a run it takes the limit from JAX's allocator; without a GPU it takes XLA_SHARE of the memory size in the target
# config. That size is set so that the limit is the one of a run with XLA_PYTHON_CLIENT_MEM_FRACTION = MEMORY_FRACTION.
MEMORY_FRACTION = 0.95  # XLA_PYTHON_CLIENT_MEM_FRACTION of the run that is planned
DRIVER_REPORTS = 1.06  # bytes per byte of the data sheet: 84.9 GB for 80, 151.4 for 141, 191.5 for 180
XLA_SHARE = 0.8


class CompiledStep(NamedTuple):
    """A compiled step."""

    text: str  # scheduled HLO
    seconds: float  # compile time
    memory: dict[str, float]  # bytes on a device: arguments; outputs that do not overwrite these; temporaries; code


def require_compiler(topology: Topology) -> None:
    """Raises ConfigError if there is no compiler for such devices, or it is not installed. To be called before JAX starts."""
    if isinstance(topology, Slice):
        installed = importlib.util.find_spec("libtpu") is not None
        check(installed, "--compile: needs the TPU compiler (but no TPU): pip install -e '.[tpu]'")
        environment = _TPU_ENVIRONMENT
    else:
        what = f"{topology.chip.device_kind} has no schedule that could be simulated; to measure it: mutransformer benchmark"
        check(isinstance(topology, Cluster), f"--compile: {what}")
        installed = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (13, 12))
        check(installed, "--compile: needs the GPU compiler (but no GPU; 5 GB of packages): pip install -e '.[cuda]'")
        environment = _GPU_ENVIRONMENT
    for key, value in environment.items():
        os.environ.setdefault(key, value)


def topology_devices(topology: Topology) -> list[Any]:
    """Devices to compile for. Raises ConfigError if the compiler is missing or does not accept the topology."""
    require_compiler(topology)
    with translate_errors(f"--topology {topology}: the compiler does not accept it"):  # of any type: jaxlib's are not public
        return list(_description(topology).devices)


def _description(topology: Topology) -> Any:
    if isinstance(topology, Cluster):  # nodes x processes of a node x GPUs of a process
        shape = f"{topology.nodes}x1x{topology.per_node}"
        return topologies.get_topology_desc(platform="cuda", target_config=target_config(topology.chip), topology=shape)
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on v4 machines; the default for the other chips
    if topology.size == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(str(topology), platform="tpu", **options)


def target_config(card: Card) -> str:
    """XLA's description of a GPU, stream_executor.GpuTargetConfigProto as text: what it would ask the driver for."""
    major, minor = card.capability
    shared = (164 if major == 8 else 228) << 10  # of a multiprocessor, of which the driver keeps 1 KiB per block
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "core_count": card.multiprocessors,
        "fpus_per_core": 64 if card.capability == (8, 0) else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": int(card.hbm_bandwidth),
        "device_memory_size": int(card.hbm_bytes * DRIVER_REPORTS * MEMORY_FRACTION / XLA_SHARE),
        "l2_cache_size": card.l2_bytes,
        "clock_rate_ghz": card.clock / 1e9,
    }
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}"
    info = " ".join(f"{name}: {value}" for name, value in fields.items())
    versions = 'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }'
    return f'gpu_device_info {{ {info} {capability} }} {versions} device_description_str: "{card.device_kind}"'


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
        raise ConfigError(f"the compiler rejects the step on {scenario.topology}: {reason}") from None
    seconds, memory = time.perf_counter() - begin, compiled_memory(compiled)
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    if text is None:
        raise ConfigError("--compile: this libtpu cannot print its schedule; use pip install jax==0.10.2 libtpu==0.0.42")
    return CompiledStep(text, seconds, memory)


def compiled_memory(compiled: Any) -> dict[str, float]:
    """Bytes on a device that a compiled program needs, by category, as in CompiledStep."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return {
        "arguments": float(analysis.argument_size_in_bytes),
        "outputs": float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        "temporaries": float(analysis.temp_size_in_bytes),
        "code": float(analysis.generated_code_size_in_bytes),
    }
