"""What is planned: a config on a slice of chips, with a mesh over them that has no devices."""

import dataclasses
import math
from dataclasses import dataclass

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mutransformer.config.run import MeshConfig
from mutransformer.config.schema import Config
from mutransformer.errors import ConfigError, check
from mutransformer.planning.chips import Topology
from mutransformer.sharding.mesh import check_fits


@dataclass(frozen=True)
class Case:
    """config: with its mesh and vocabulary filled in."""

    config: Config
    topology: Topology
    mesh: AbstractMesh

    @property
    def sizes(self) -> dict[str, int]:
        """Of the mesh, by axis, in the order in which devices are numbered."""
        return dict(self.mesh.shape)


def make(config: Config, topology: Topology) -> Case:
    """Raises ConfigError: the mesh does not cover the slice, or cannot divide the model or the batch."""
    config = config.with_vocab(config.model.n_vocab or config.data.vocab_size)
    given = axes(config.mesh)
    fixed = math.prod(size for size in given.values() if size != -1)
    told = ", ".join(f"mesh.{axis} = {size}" for axis, size in given.items())
    check(
        topology.size % fixed == 0 if -1 in given.values() else topology.size == fixed,
        f"{told}: cannot cover {topology}, which has {topology.size} chips",
    )
    sizes = {axis: topology.size // fixed if size == -1 else size for axis, size in given.items()}
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    device = AbstractDevice(device_kind=topology.chip.kind, num_cores=topology.chip.cores, platform="tpu")
    types = (AxisType.Auto,) * len(sizes)
    names = tuple({"replicas": "z"}.get(key, key) for key in sizes)
    mesh = AbstractMesh(tuple(sizes.values()), names, types, abstract_device=device)
    check_fits(config, mesh)
    return Case(config, topology, mesh)


def axes(config: MeshConfig) -> dict[str, int]:
    """Sizes by key of the mesh, from the outermost axis to the innermost; of slices only if there are several."""
    return {**({"replicas": config.replicas} if config.replicas > 1 else {}), "x": config.x, "y": config.y}


def read_mesh(text: str, config: Config) -> Config:
    """The config with another mesh.

    Args:
        text: "x=16,y=4"; x is what the others leave if it is not given.
        config: whose mesh is replaced.

    Raises:
        ConfigError: it is not of that form.
    """
    known = ("x", "y")
    given: dict[str, int] = dict.fromkeys(known, 1) | {"x": -1}
    for part in text.split(","):
        axis, _, size = (each.strip() for each in part.partition("="))
        if axis not in known or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh {text}: write a size for each axis of {', '.join(known)}, as in x=16,y=4")
        given[axis] = int(size)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **given))
