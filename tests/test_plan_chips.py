"""TPU chips, and the names of slices."""

import math

import pytest

from mutransformer.errors import ConfigError
from mutransformer.planning.chips import CHIPS, Slice, parse_slice
from mutransformer.planning.machines import parse_topology


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5p-8", (2, 2, 1)),
        ("v5p-16", (2, 2, 2)),
        ("v5p-128", (4, 4, 4)),
        ("v5p-512", (4, 8, 8)),
        ("v5p-2048", (8, 8, 16)),
        ("v4-8", (2, 2, 1)),
        ("v4-512", (4, 8, 8)),
        ("v5e-64", (8, 8)),
        ("v5e-8", (2, 4)),
        ("v6e-256", (16, 16)),
        ("v5p:4x4x4", (4, 4, 4)),
        ("v5p:8x4x4", (8, 4, 4)),
        ("v6e:1x1", (1, 1)),
        ("v5e:16x8", (16, 8)),
    ],
)
def test_slice_names(name, shape):
    topology = parse_topology(name)
    assert isinstance(topology, Slice) and topology.shape == shape and topology.size == math.prod(shape)
    assert parse_topology(str(topology)) == topology


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "no such device; TPU chips are v4, v5e, v5p, v6e, GPUs a100") for name in ("v7", "cpu", "gpu-8", "")),
        *((name, "each of the 3 axes") for name in ("v5p", "v5p:4x4", "v5p:4x4x", "v5p:axb", "v5p-", "v5p:0x4x4")),
        ("v5e:2x2x2", "each of the 2 axes"),
        ("v5e-6", "nearest are v5e:1x1, v5e:2x2, v5e:2x4. .* counts chips"),
        ("v5p:3x4x4", "nearest are v5p:2x2x4, v5p:2x4x4, v5p:4x4x4"),
        ("v5e:32x32", "nearest are .* v5e:16x16"),
        ("v5p:4x4x32", "v5p has no such slice"),
        ("v5p-10", "counts TensorCores"),
        ("v5p-9", "v5p has no such slice"),
    ],
)
def test_an_unknown_slice_is_a_one_line_error(name, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_topology(name)
    assert "\n" not in str(caught.value) and f"--topology {name}" in str(caught.value)


def test_which_axes_are_rings():
    assert parse_slice("v5p:4x4x8").rings == (True, True, True)
    assert parse_slice("v5p:2x4x4").rings == (False, False, False)
    assert parse_slice("v5e:8x16").rings == (False, True)


def test_peak_flops_follow_from_the_clock():
    # Multipliers: 128 x 128 in each of 4 matrix units of a core; v6e has 256 x 256 in 4.
    for chip in CHIPS.values():
        multipliers = 4 * (256**2 if chip.name == "v6e" else 128**2) * chip.cores
        assert chip.peak_flops == pytest.approx(2 * multipliers * chip.clock, rel=0.005)
