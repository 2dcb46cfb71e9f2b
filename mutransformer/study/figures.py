"""What all figures of a study share: matplotlib itself, the style, the colors, and PNG and SVG files with reproducible bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mutransformer.errors import ConfigError

try:
    import matplotlib
    import matplotlib.style
    from matplotlib.figure import Figure as Figure
    from matplotlib.lines import Line2D as Line2D
except ImportError:
    raise ConfigError("figures need matplotlib: pip install 'mutransformer[plots]'") from None

STYLE: list[Any] = [
    "default",  # ignores the user's matplotlibrc
    {
        **{"font.size": 9.5, "axes.titlesize": 10, "legend.fontsize": 9, "legend.frameon": False},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8"},
        **{"axes.axisbelow": True, "lines.linewidth": 1.6, "figure.constrained_layout.use": True},
        **{"svg.hashsalt": "mutransformer", "savefig.dpi": 160},
    },
]


def save(draw: Callable[..., Figure], *args: Any, path: Path) -> None:
    """Writes the figure draw(*args) to path.png and path.svg; equal arguments give equal bytes."""
    with matplotlib.style.context(STYLE):
        figure = draw(*args)
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def shades(ascending: Sequence[int]) -> dict[int, Any]:
    """A color for each, from pale to dark; the palest part of the scale would be invisible on white."""
    scale = matplotlib.colormaps["viridis_r"]
    return {key: scale(0.18 + 0.82 * at / max(1, len(ascending) - 1)) for at, key in enumerate(ascending)}
