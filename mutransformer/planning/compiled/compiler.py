"""Compiles the train step with the TPU compiler on a machine without a TPU. The only module here that needs libtpu."""

import importlib.util
import os
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mutransformer.errors import ConfigError, check
from mutransformer.planning.chips import Topology
from mutransformer.planning.estimate.work import abstract_batch
from mutransformer.planning.scenario import Scenario
from mutransformer.training.program import build
from mutransformer.training.step import make_train_step


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step.

    Attributes:
        text: scheduled HLO.
        seconds: compile time.
        memory: bytes on a device: arguments; outputs, those that do not overwrite arguments; temporaries; code.
    """

    text: str
    seconds: float
    memory: dict[str, float]


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
    try:
        return list(topologies.get_topology_desc(str(topology), platform="tpu", **options).devices)
    except Exception as error:  # jaxlib's exception types are not public
        raise ConfigError(f"--topology {topology}: the TPU compiler does not accept it: {str(error).splitlines()[0]}") from None


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
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    if text is None:
        raise ConfigError("--compile: this libtpu cannot print its schedule; use pip install jax==0.10.2 libtpu==0.0.42")
    return CompiledStep(text, seconds, {key: float(size) for key, size in memory.items()})
