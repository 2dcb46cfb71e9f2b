"""What is planned: a config on a slice of chips, with a mesh over them that needs no devices."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mutransformer.config.run import MeshConfig
from mutransformer.config.schema import Config
from mutransformer.errors import ConfigError, check
from mutransformer.planning.chips import Topology
from mutransformer.training.program import Program, Vocabulary, build


@dataclass(frozen=True)
class Scenario:
    """A program on an abstract mesh over a slice."""

    program: Program
    topology: Topology

    @property
    def config(self) -> Config:
        """With mesh sizes and vocabulary filled in."""
        return self.program.config

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Devices along each mesh axis, in the order in which devices are numbered."""
        return dict(self.program.mesh.shape)

    @property
    def settings(self) -> str:
        """Mesh, rematerialization and accumulation as command-line arguments."""
        c, mesh = self.config, " ".join(f"mesh.{axis}={size}" for axis, size in self.mesh_sizes.items())
        return f"{mesh} model.remat={c.model.remat} optim.grad_accumulation_steps={c.optim.grad_accumulation_steps}"


def make_scenario(config: Config, topology: Topology) -> Scenario:
    """The scenario of a config on a slice; a mesh axis of -1 takes the chips that the others leave.

    Raises:
        ConfigError: the mesh does not cover the slice, or cannot divide the model or the batch.
    """
    sizes = mesh_axes(config.mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    covered = topology.size % fixed == 0 if -1 in sizes.values() else topology.size == fixed
    named = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
    check(covered, f"{named}: cannot cover {topology}, which has {topology.size} chips")
    sizes = {axis: topology.size // fixed if size == -1 else size for axis, size in sizes.items()}
    device = AbstractDevice(device_kind=topology.chip.device_kind, num_cores=topology.chip.cores, platform="tpu")
    names = tuple({"replicas": "z"}.get(key, key) for key in sizes)
    mesh = AbstractMesh(tuple(sizes.values()), names, (AxisType.Auto,) * len(sizes), abstract_device=device)
    vocabulary = Vocabulary(config.model.n_vocab or config.data.vocab_size)
    return Scenario(build(replaced(config, "mesh", **sizes), mesh, vocabulary), topology)


def mesh_axes(config: MeshConfig) -> dict[str, int]:
    """Mesh sizes by config key, outermost axis first; replicas only if there are several."""
    return {**({"replicas": config.replicas} if config.replicas > 1 else {}), "x": config.x, "y": config.y}


def with_mesh(config: Config, text: str | None) -> Config:
    """The config with the mesh of a text such as "x=16,y=4"; without x, x takes the chips that y leaves.

    Raises:
        ConfigError: the text is not of that form.
    """
    if text is None:
        return config
    sizes = {"x": -1, "y": 1}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh {text}: write a size for each axis of {', '.join(sizes)}, as in x=16,y=4")
        sizes[axis] = int(size)
    return replaced(config, "mesh", **sizes)


def replaced(config: Config, section: str, **values: Any) -> Config:
    """The config with other values in one section."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
