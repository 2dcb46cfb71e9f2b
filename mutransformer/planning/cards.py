"""NVIDIA GPUs as data, and clusters of them: `h100:8` is one node of eight, `h100:4x8` four such nodes.

All GPUs of a node reach each other through NVSwitch, each over its own NVLink ports; each GPU has a network adapter of its own
for other nodes. Every mesh axis goes over the same ports, so their times add up. GPUs are numbered node by node: the last mesh
axis, y, stays within a node if its size divides the GPUs of a node.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mutransformer.errors import ConfigError, check
from mutransformer.planning.topology import Device, LinkUse, Topology

NVLINK, NETWORK = "NVLink", "network"


@dataclass(frozen=True)
class Card(Device):
    """Published figures of one GPU."""

    nvlink_bandwidth: float  # bytes/s that it can send to others of its node, half of the total that data sheets give
    network_bandwidth: float  # bytes/s that it can send to other nodes
    domain: int  # GPUs that NVSwitch connects at most
    multiprocessors: int
    capability: tuple[int, int]  # CUDA's compute capability
    l2_bytes: int
    clock: float  # Hz, the highest


# NVIDIA's data sheets: A100 80GB, H100, H200, DGX B200 (its totals / 8), GB200 NVL72 (its totals / 72). Memory is what the sheet
# states; the driver reports 6 % more. Network: one ConnectX-7 of 400 Gbit/s per GPU; in DGX A100 one ConnectX-6 of 200 Gbit/s.
_AMPERE = {"domain": 8, "capability": (8, 0), "l2_bytes": 40 << 20}
_HOPPER = {"domain": 8, "capability": (9, 0), "l2_bytes": 50 << 20}
_BLACKWELL = {"capability": (10, 0), "l2_bytes": 126 << 20}
CARDS = {
    card.name: card
    for card in (
        Card("a100", "NVIDIA A100-SXM4-80GB", 80e9, 2039e9, 300e9, 25e9, multiprocessors=108, clock=1.41e9, **_AMPERE),
        Card("h100", "NVIDIA H100 80GB HBM3", 80e9, 3350e9, 450e9, 50e9, multiprocessors=132, clock=1.98e9, **_HOPPER),
        Card("h200", "NVIDIA H200", 141e9, 4800e9, 450e9, 50e9, multiprocessors=132, clock=1.98e9, **_HOPPER),
        Card("b200", "NVIDIA B200", 180e9, 8000e9, 900e9, 50e9, multiprocessors=148, clock=1.965e9, domain=8, **_BLACKWELL),
        Card("gb200", "NVIDIA GB200", 186e9, 8000e9, 900e9, 50e9, multiprocessors=152, clock=2.062e9, domain=72, **_BLACKWELL),
    )
}


@dataclass(frozen=True)
class Cluster(Topology):
    """Nodes of GPUs."""

    chip: Card
    nodes: int
    per_node: int

    noun: ClassVar[str] = "GPU"
    compute_unit: ClassVar[str] = "tensor cores"

    def __str__(self) -> str:
        return f"{self.chip.name}:{self.per_node}" if self.nodes == 1 else f"{self.chip.name}:{self.nodes}x{self.per_node}"

    @property
    def platform(self) -> str:
        return "gpu"

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    @property
    def n_cores(self) -> int:
        return self.chip.multiprocessors

    def links(self, kind: str, full: float, mesh: Mapping[str, int], axes: tuple[str, ...]) -> dict[str, LinkUse]:
        """A gather over N nodes with g GPUs each in a group: every GPU fetches 1/g of what its node lacks over the network,
        (N - 1) / N / g of the array, and hands it on to its node over NVLink, which carries (g - 1) / g of the array.

        A sum goes the same way back, an all-reduce both ways (sums inside the switches, which NVLink 4 can do, are not counted).
        In an all-to-all, each GPU sends 1/n of its array to each of the others. A permute sends it once.
        """
        n_nodes, each = nodes_of_group(tuple(mesh.items()), axes, self.per_node)
        n = n_nodes * each
        if kind == "collective-permute":
            shares = {NETWORK: 1.0} if n_nodes > 1 else {NVLINK: 1.0}
        elif kind in ("all-to-all", "ragged-all-to-all"):
            shares = {NVLINK: (each - 1) / n, NETWORK: (n - each) / n}
        else:
            ways = 2 if kind == "all-reduce" else 1
            shares = {NVLINK: ways * (each - 1) / each, NETWORK: ways * (n_nodes - 1) / n_nodes / each}
        speed = {NVLINK: self.chip.nvlink_bandwidth, NETWORK: self.chip.network_bandwidth}
        return {unit: LinkUse(full * share, full * share / speed[unit]) for unit, share in shares.items() if share}

    def larger(self) -> "Cluster":
        if self.nodes == 1 and self.per_node < self.chip.domain:
            return Cluster(self.chip, 1, min(2 * self.per_node, self.chip.domain))
        return Cluster(self.chip, 2 * self.nodes, self.per_node)

    def figures(self) -> dict[str, float]:
        links = {"nvlink_bandwidth": self.chip.nvlink_bandwidth, "network_bandwidth": self.chip.network_bandwidth}
        return super().figures() | links


@functools.lru_cache
def nodes_of_group(mesh: tuple[tuple[str, int], ...], axes: tuple[str, ...], per_node: int) -> tuple[int, float]:
    """Over how many nodes a group of devices along mesh axes is spread, and how many of them are in a node, on average.

    Of several groups, the one that is spread over most nodes. mesh: axes and sizes; devices are numbered along it, the last axis
    fastest.
    """
    names, sizes = zip(*mesh, strict=True)
    nodes = np.arange(np.prod(sizes)).reshape(sizes) // per_node
    along = [names.index(axis) for axis in axes]
    groups = np.moveaxis(nodes, along, range(-len(along), 0)).reshape(-1, int(np.prod([sizes[i] for i in along])))
    n_nodes = max(len(np.unique(group)) for group in groups)
    return n_nodes, groups.shape[1] / n_nodes


def parse_cluster(name: str) -> Cluster:
    """The GPUs with a name: `h100` is one, `h100:8` a node of eight, `h100:4x8` four such nodes.

    Raises ConfigError if no node has so many. The name begins with a key of CARDS.
    """
    kind = re.split("[:-]", name)[0]
    card = CARDS[kind]
    found = re.fullmatch(r"(?::(?:([1-9]\d*)x)?([1-9]\d*))?", name[len(kind) :])
    form = f"write GPUs of a node, as in {kind}:8, or nodes x GPUs of each, as in {kind}:4x8"
    if found is None:
        raise ConfigError(f"--topology {name}: not a number of GPUs; {form}")
    nodes, per_node = int(found[1] or 1), int(found[2] or 1)
    within = f"NVSwitch connects at most {card.domain} {kind} GPUs"
    check(per_node <= card.domain, f"--topology {name}: {within}; {form}")
    return Cluster(card, nodes, per_node)
