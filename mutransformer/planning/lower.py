"""The train step through the real TPU compiler, on a machine without a TPU. The only module here that needs libtpu."""

import importlib.util
import os
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from mutransformer.errors import ConfigError, check
from mutransformer.planning import trace
from mutransformer.planning.case import Case
from mutransformer.planning.chips import Topology
from mutransformer.sharding.mesh import make_mesh, rows
from mutransformer.training.state import plan
from mutransformer.training.step import make_train_step


@dataclass(frozen=True)
class Compiled:
    """Attributes:
    text: scheduled HLO.
    seconds: that the compiler took.
    arguments: bytes on a device: state and batch.
    outputs: those that are not written over arguments.
    temporaries: and code: likewise.
    """

    text: str
    seconds: float
    arguments: float
    outputs: float
    temporaries: float
    code: float


def require_compiler() -> None:
    """Raises ConfigError: the TPU compiler is not installed."""
    check(
        importlib.util.find_spec("libtpu") is not None,
        "--compile: needs the TPU compiler, which no TPU is needed for: pip install -e '.[tpu]'",
    )


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for.

    Raises:
        ConfigError: the compiler is missing, or does not take the slice.
    """
    require_compiler()
    # Compile only: no metadata server to ask, no chip to hold.
    for key, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on v4 machines; the others are so without being told
    if topology.size == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(str(topology), platform="tpu", **options).devices)
    except Exception as error:  # jaxlib's own kinds, of which none is public
        raise ConfigError(f"--topology {topology}: the TPU compiler does not take it: {str(error).splitlines()[0]}") from None


def compile_step(case: Case) -> Compiled:
    """Compiles the step that training would run.

    Raises:
        ConfigError: the compiler is missing, or finds that the step does not fit into memory.
    """
    mesh = make_mesh(case.config.mesh, devices(case.topology))
    lowered = make_train_step(case.config, mesh, bos_id=0).lower(plan(case.config, mesh).shapes, _batch(case, mesh))
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "memory" in line), lines[0])
        raise ConfigError(f"the compiler refuses the step on {case.topology}: {reason}") from None
    seconds = time.perf_counter() - begin
    text, memory = _text(compiled), compiled.memory_analysis()
    assert memory is not None
    return Compiled(
        text,
        seconds,
        float(memory.argument_size_in_bytes),
        float(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        float(memory.temp_size_in_bytes),
        float(memory.generated_code_size_in_bytes),
    )


def _text(compiled: jax.stages.Compiled) -> str:
    """Raises ConfigError: this pair of compiler and JAX does not give the schedule."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    check(text is not None, "--compile: this libtpu does not print what it compiled; pip install jax==0.10.2 libtpu==0.0.42 does")
    assert text is not None
    return text


def _batch(case: Case, mesh: Mesh) -> Any:
    at = NamedSharding(mesh, rows(mesh))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), trace.abstract_batch(case.config))
