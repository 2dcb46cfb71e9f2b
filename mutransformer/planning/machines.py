"""What --topology names: a slice of TPU chips, nodes of GPUs, or this machine."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from mutransformer.errors import check
from mutransformer.planning.cards import CARDS, Card, Cluster, parse_cluster
from mutransformer.planning.chips import CHIPS, Chip, Slice, parse_slice
from mutransformer.planning.topology import Device, LinkUse, Topology
from mutransformer.sharding.devices import memory_limit

HERE = "here"


@dataclass(frozen=True)
class Unrated(Topology):
    """Devices of a kind without published figures, as CPUs are: a plan has memory and work, but no times."""

    n_devices: int
    backend: str

    noun: ClassVar[str] = "device"
    compute_unit: ClassVar[str] = "compute"
    has_figures: ClassVar[bool] = False

    def __str__(self) -> str:
        return HERE

    @property
    def platform(self) -> str:
        return self.backend

    @property
    def size(self) -> int:
        return self.n_devices

    def links(self, kind: str, full: float, mesh: Mapping[str, int], axes: tuple[str, ...]) -> dict[str, LinkUse]:
        return {}

    def larger(self) -> None:
        return None

    def figures(self) -> dict[str, float]:
        return {"hbm_bytes": self.chip.hbm_bytes}


def parse_topology(name: str) -> Topology:
    """What a name stands for: `v5p:4x4x4` or `v5p-128`, `h100:4x8`, or `here` for the devices of this machine.

    Raises ConfigError if there is no such chip or GPU, or not in that number.
    """
    if name == HERE:
        return this_machine()
    kind = re.split("[:-]", name)[0]
    known = f"TPU chips are {', '.join(CHIPS)}, GPUs {', '.join(CARDS)}; {HERE} means this machine"
    check(kind in CHIPS or kind in CARDS, f"--topology {name}: no such device; {known}")
    return parse_slice(name) if kind in CHIPS else parse_cluster(name)


def this_machine() -> Topology:
    """The devices that JAX sees, with the memory that a program may use of them.

    GPUs are taken as nodes of one process each, TPU chips as the smallest box around them.
    """
    devices = jax.devices()
    first, local = devices[0], jax.local_devices()
    rated = next((each for each in (*CHIPS.values(), *CARDS.values()) if each.device_kind == first.device_kind), None)
    usable = float(memory_limit(local[0], len(local)))
    if isinstance(rated, Card):
        return Cluster(dataclasses.replace(rated, hbm_bytes=usable), len(devices) // len(local), len(local))
    if isinstance(rated, Chip):
        ends = [max(place) + 1 for place in zip(*(device.coords for device in devices), strict=True)]
        return Slice(dataclasses.replace(rated, hbm_bytes=usable), tuple(ends[: len(rated.pod)]))
    return Unrated(Device(HERE, first.device_kind, usable, math.nan), len(devices), first.platform)
