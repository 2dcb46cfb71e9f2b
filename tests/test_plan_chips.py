"""Chips and names of slices."""

import math

import pytest

from mutransformer.errors import ConfigError
from mutransformer.planning.chips import CHIPS, parse


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("v5p-8", (2, 2, 1)), ("v5p-16", (2, 2, 2)), ("v5p-128", (4, 4, 4)), ("v5p-512", (4, 8, 8)), ("v5p-2048", (8, 8, 16))),
        *(("v4-8", (2, 2, 1)), ("v4-512", (4, 8, 8)), ("v5e-64", (8, 8)), ("v5e-8", (2, 4)), ("v6e-256", (16, 16))),
        *(("v5p:4x4x4", (4, 4, 4)), ("v5p:8x4x4", (8, 4, 4)), ("v6e:1x1", (1, 1)), ("v5e:16x8", (16, 8))),
    ],
)
def test_a_name_gives_a_box_of_chips(name, shape):
    topology = parse(name)
    assert topology.shape == shape and topology.size == math.prod(shape)
    assert parse(str(topology)) == topology


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(
            ("v7", "no such chip"),
            ("cpu", "no such chip"),
            ("gpu-8", "no such chip"),
            ("", "no such chip"),
            ("v5p", "write chips"),
        ),
        *(("v5p:4x4", "has 3 axes"), ("v5e:2x2x2", "has 2 axes"), ("v5p:3x4x4", "no such slice"), ("v5e:32x32", "no such slice")),
        *(("v5p:4x4x32", "no such slice"), ("v5p-10", "no slice of 10"), ("v5p-9", "no slice of 9"), ("v5e-6", "no slice of 6")),
        *(("v5p:4x4x", "write chips"), ("v5p:axb", "write chips"), ("v5p-", "write chips"), ("v5p:0x4x4", "no such slice")),
    ],
)
def test_what_is_no_slice_is_told_in_a_line(name, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        parse(name)
    assert "\n" not in str(caught.value) and f"--topology {name}" in str(caught.value)


def test_rings_close_where_the_torus_is_whole():
    assert parse("v5p:4x4x8").wraps == (True, True, True)
    assert parse("v5p:2x4x4").wraps == (False, False, False)
    assert parse("v5e:8x16").wraps == (False, True)


def test_peaks_follow_from_clocks():
    # Multipliers: 128 x 128 in each of 4 matrix units of a core; v6e has 256 x 256 in 4.
    for chip in CHIPS.values():
        multipliers = 4 * (256**2 if chip.name == "v6e" else 128**2) * chip.cores
        assert chip.peak_flops == pytest.approx(2 * multipliers * chip.clock, rel=0.005)
