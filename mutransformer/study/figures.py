"""The figures of all studies, their style and colors, and PNG and SVG files with reproducible bytes."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mutransformer.errors import ConfigError
from mutransformer.mup.checks.slopes import SlopeFit
from mutransformer.study.sweep.grid import Axis

try:
    import matplotlib
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError:
    raise ConfigError("figures need matplotlib: pip install 'mutransformer[plots]'") from None

STYLE: list[Any] = [
    "default",  # ignores the user's matplotlibrc
    {
        "font.size": 9.5,
        "axes.titlesize": 10,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e8e8e8",
        "axes.axisbelow": True,
        "lines.linewidth": 1.6,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "mutransformer",
        "savefig.dpi": 160,
    },
]
TITLES = {"size": "mean |x|", "change": "mean |change of x since the start|", "update": "mean |update of the weight|"}
CONTROL: dict[str, Any] = {"color": "#9a9a9a", "linestyle": "--", "linewidth": 1.0, "zorder": 1}


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


def coordinates(fits: Sequence[SlopeFit], subject: str, control: str | None, axis: Axis) -> Figure:
    """The fits, all of one kind; the control's lines are dashed."""
    names = list(dict.fromkeys(fit.name for fit in fits))
    steps = sorted({fit.step for fit in fits})
    rows, columns = math.ceil(len(names) / 4), 4
    figure = Figure(figsize=(2.5 * columns + 0.4, 2.1 * rows + 0.9))
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    colors, at = shades(steps), fits[0].at
    for axes, name in zip(panels.flat, names, strict=False):
        axes.set(title=name.replace("_", " ").removeprefix("blocks."), xscale="log", yscale="log")
        for fit in fits:
            if fit.name == name:
                style = {"color": colors[fit.step]} if fit.variant == subject else CONTROL
                shown = [mean if 0 < mean < math.inf else math.nan for mean in fit.means]  # a log scale has no zero
                axes.plot(fit.at, shown, marker="o", markersize=2.5, **style)
        axes.set_xticks(at, [str(a) for a in at])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        if high / low < 8:  # a flat line should look flat
            middle = math.sqrt(low * high)
            axes.set_ylim(middle / 3, middle * 3)
    remove(panels.flat[len(names) :])
    figure.supxlabel(axis)
    figure.supylabel(TITLES[fits[0].kind])
    marks = [Line2D([], [], color=colors[step], label=f"{step}") for step in steps]
    if control is not None:
        marks.append(Line2D([], [], **CONTROL, label=f"control: {control}"))
    title = f"{subject}, updates done"
    figure.legend(handles=marks, title=title, loc="outside upper center", ncols=len(marks), columnspacing=1.0)
    return figure


def remove(unused: Iterable[Axes]) -> None:
    for axes in unused:
        axes.remove()
