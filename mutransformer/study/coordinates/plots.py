"""The figures of a coordinate check: a panel for each activation or weight, a line for each step."""

import math
from collections.abc import Sequence
from typing import Any

from mutransformer.study.coordinates.slopes import SlopeFit
from mutransformer.study.figures import Figure, Line2D, shades
from mutransformer.study.sweep.grid import Axis

COLUMNS = 4
TITLES = {"size": "mean |x|", "change": "mean |change of x since the start|", "update": "mean |update of the weight|"}
CONTROL: dict[str, Any] = {"color": "#9a9a9a", "linestyle": "--", "linewidth": 1.0, "zorder": 1}


def coordinates(fits: Sequence[SlopeFit], subject: str, control: str | None, axis: Axis) -> Figure:
    """The fits, all of one kind; the control's lines are dashed."""
    names = list(dict.fromkeys(fit.name for fit in fits))
    steps = sorted({fit.step for fit in fits})
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(2.5 * COLUMNS + 0.4, 2.1 * rows + 0.9))
    panels = figure.subplots(rows, COLUMNS, sharex=True, squeeze=False)
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
    for axes in panels.flat[len(names) :]:
        axes.remove()
    figure.supxlabel(axis)
    figure.supylabel(TITLES[fits[0].kind])
    marks = [Line2D([], [], color=colors[step], label=f"{step}") for step in steps]
    if control is not None:
        marks.append(Line2D([], [], **CONTROL, label=f"control: {control}"))
    legend: dict[str, Any] = {"loc": "outside upper center", "ncols": len(marks), "columnspacing": 1.0}
    figure.legend(handles=marks, title=f"{subject}, updates done", **legend)
    return figure
