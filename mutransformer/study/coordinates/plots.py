"""The figures of a coordinate check: a panel for each activation or weight, a line for each step."""

import math
from collections.abc import Sequence
from typing import Any, Optional

from mutransformer.study.coordinates.measure import Axis
from mutransformer.study.coordinates.slopes import Line
from mutransformer.study.transfer.plots import Figure, Line2D, shades

COLUMNS = 4
TITLES = {"size": "mean |x|", "change": "mean |change of x since the start|", "update": "mean |update of the weight|"}
CONTROL: dict[str, Any] = {"color": "#9a9a9a", "linestyle": "--", "linewidth": 1.0, "zorder": 1}


def coordinates(found: Sequence[Line], subject: str, control: Optional[str], axis: Axis) -> Figure:
    """All lines are of one kind; the control's are dashed."""
    names = list(dict.fromkeys(line.name for line in found))
    steps = sorted({line.step for line in found})
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(2.5 * COLUMNS + 0.4, 2.1 * rows + 0.9))
    panels = figure.subplots(rows, COLUMNS, sharex=True, squeeze=False)
    colours = shades(steps)
    for axes, name in zip(panels.flat, names, strict=False):
        axes.set(title=name.replace("_", " ").removeprefix("blocks."), xscale="log", yscale="log")
        for line in found:
            if line.name == name:
                style = {"color": colours[line.step]} if line.variant == subject else CONTROL
                shown = [mean if 0 < mean < math.inf else math.nan for mean in line.means]  # zero has no place on this scale
                axes.plot(line.at, shown, marker="o", markersize=2.5, **style)
        at = found[0].at
        axes.set_xticks(at, [str(a) for a in at])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        if high / low < 8:  # flat lines are to look flat
            middle = math.sqrt(low * high)
            axes.set_ylim(middle / 3, middle * 3)
    for axes in panels.flat[len(names) :]:
        axes.remove()
    figure.supxlabel(axis)
    figure.supylabel(TITLES[found[0].kind])
    marks = [Line2D([], [], color=colours[step], label=f"{step}") for step in steps]
    if control is not None:
        marks.append(Line2D([], [], **CONTROL, label=f"control: {control}"))
    figure.legend(
        handles=marks, loc="outside upper center", ncols=len(marks), title=f"{subject}, updates done", columnspacing=1.0
    )
    return figure
