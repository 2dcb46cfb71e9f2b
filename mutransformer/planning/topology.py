"""What is planned for: devices of one kind, and how long collectives keep the links between them busy."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from mutransformer.sharding.devices import peak_flops

HBM_EFFICIENCY = 0.85  # the fraction of the published bandwidth that a plain loop over memory reaches


@dataclass(frozen=True)
class Device:
    """Published figures of what JAX shows as one device."""

    name: str
    device_kind: str  # JAX's name for it
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_flops(self.device_kind)
        assert peak is not None, self.device_kind
        return peak


class LinkUse(NamedTuple):
    """What a device sends in a collective over one kind of link, and for how long that takes at the published bandwidth."""

    bytes: float
    seconds: float


@dataclass(frozen=True)
class Topology(ABC):
    """Devices of one kind and their links. Its str() is its name."""

    chip: Device

    noun: ClassVar[str]  # for one device
    compute_unit: ClassVar[str]  # that multiplies matrices
    has_figures: ClassVar[bool] = True  # FLOP/s and bandwidths: without, a plan has no times

    @property
    @abstractmethod
    def platform(self) -> str:
        """As JAX names it."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of devices."""

    @property
    def count(self) -> str:
        """Number of devices, for a message."""
        return f"{self.size} {self.noun}{'' if self.size == 1 else 's'}"

    @property
    def n_cores(self) -> int:
        """Cores of a device."""
        return 1

    @abstractmethod
    def links(self, kind: str, full: float, mesh: Mapping[str, int], axes: tuple[str, ...]) -> dict[str, LinkUse]:
        """The use of each kind of link by one collective.

        Args:
            kind: XLA's name of the collective.
            full: bytes of the full array, gathered or not yet reduced.
            mesh: sizes by axis, in the order in which devices are numbered.
            axes: that the collective runs over.
        """

    @abstractmethod
    def larger(self) -> "Topology | None":
        """The next larger one, of about twice the size; None if there is none."""

    def describe(self, unit: str) -> str:
        """What is sent over links of a kind, for a table."""
        return f"sent per {self.noun} over {unit}"

    def figures(self) -> dict[str, float]:
        """The published constants that times follow from, by name."""
        chip = self.chip
        return {"peak_flops": chip.peak_flops, "hbm_bytes": chip.hbm_bytes, "hbm_bandwidth": chip.hbm_bandwidth}


def sent_fraction(kind: str, n: int) -> float:
    """Bytes that each of n devices sends, per byte of the full array (gathered, or not yet reduced).

    all-gather, reduce-scatter, all-to-all: (n - 1) / n. all-reduce: twice that. collective-permute: 1.
    """
    if kind == "collective-permute":
        return 1.0
    return (n - 1) / n * (2 if kind == "all-reduce" else 1)
