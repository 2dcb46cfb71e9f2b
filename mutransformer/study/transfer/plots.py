"""The two figures of a transfer report, as PNG and SVG files whose bytes depend on the numbers alone."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mutransformer.errors import ConfigError
from mutransformer.study.transfer.fit import Variant
from mutransformer.study.transfer.width_ordering import Order

try:
    import matplotlib
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise ConfigError("figures need matplotlib: pip install 'mutransformer[plots]'") from None

STYLE: list[Any] = [
    "default",  # not what a matplotlibrc of the user's says
    {
        **{"font.size": 9.5, "axes.titlesize": 10, "legend.fontsize": 9, "legend.frameon": False},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8"},
        **{"axes.axisbelow": True, "lines.linewidth": 1.6, "figure.constrained_layout.use": True},
        **{"svg.hashsalt": "mutransformer", "savefig.dpi": 160},
    },
]
COLUMNS = 3  # of panels, at most: a README shows a figure some 900 pixels wide
EDGE = 0.97  # how high in a panel stands what lies beyond it
WRONG = "#d6272a"


def save(draw: Callable[..., Figure], *what: Any, path: Path) -> None:
    """Draws what, and writes path.png and path.svg; the same numbers give the same bytes."""
    with matplotlib.style.context(STYLE):
        figure = draw(*what)
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def loss_against_rate(variants: Sequence[Variant]) -> Figure:
    """Validation loss against log2(LR): a panel for each variant, a line for each width, all on one scale of losses."""
    rows, columns = _grid(len(variants))
    figure = Figure(figsize=(max(5.0, 3.2 * columns + 0.4), 2.9 * rows + 0.6))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    colours = _colours(variants)
    for axes, variant in zip(panels.flat, variants, strict=False):
        axes.set(title=_title(variant), xlabel="log2(learning rate)", ylim=loss_range(variants))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        tuned = variant.best[variant.widths[0]]
        if tuned is not None:
            axes.axvline(tuned, color="#888888", linestyle=":", linewidth=1.2, zorder=1)
        for width in variant.widths:
            _rate_line(axes, variant, width, colours[width])
    for axes in panels.flat[len(variants) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("validation loss, nats a token")
    marks = [
        Line2D([], [], **OPTIMUM, color="#bbbbbb", label="vertex of the parabola"),
        Line2D([], [], linestyle=":", color="#888888", linewidth=1.2, label="best at the smallest width"),
    ]
    if any(variant.diverged for variant in variants):
        marks.append(Line2D([], [], **DIVERGED, color="#555555", label="diverged"))
    _legend(figure, colours, marks)
    return figure


OPTIMUM: dict[str, Any] = {
    "linestyle": "none",
    "marker": "D",
    "markersize": 6,
    "markeredgecolor": "black",
    "markeredgewidth": 0.9,
}
DIVERGED: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 5.5, "markeredgewidth": 1.5}


def _rate_line(axes: Axes, variant: Variant, width: int, colour: Any) -> None:
    cells = {rate: cell for (w, rate), cell in variant.cells.items() if w == width}
    rates = np.array(list(cells))
    means = np.array([cell.mean for cell in cells.values()])
    spread = np.array([cell.spread or 0.0 for cell in cells.values()])
    shown = _finite(means)  # a diverged point interrupts the line
    axes.plot(rates, shown, color=colour, marker="o", markersize=3.5)
    axes.fill_between(rates, shown - spread, shown + spread, color=colour, alpha=0.2, linewidth=0)
    # Beside each other, or the widths that diverge at one rate would hide one another.
    place = variant.widths.index(width) - (len(variant.widths) - 1) / 2
    lost = rates[np.isinf(means)] + place * min(np.diff(variant.rates)) / (2 * len(variant.widths))
    axes.plot(lost, np.full(len(lost), EDGE), **DIVERGED, color=colour, transform=axes.get_xaxis_transform())
    optimum, stderr = variant.optima[width], variant.stderr[width]
    if optimum.loss is not None:
        xerr = None if stderr is None else [stderr]
        axes.errorbar([optimum.low], [optimum.loss], xerr=xerr, **OPTIMUM, color=colour, ecolor="black", capsize=2, zorder=5)


def loss_range(variants: Sequence[Variant]) -> tuple[float, float]:
    """Limits of the losses that are of interest: the best ones and their surroundings, not what lies far above them."""
    best, nearby, highest = [], [], []
    for variant in variants:
        for width in variant.widths:
            means = {rate: cell.mean for (w, rate), cell in variant.cells.items() if w == width and math.isfinite(cell.mean)}
            rate = variant.best[width]
            if rate is not None:
                best.append(means[rate])
                highest.append(max(means.values()))
                nearby += [loss for r, loss in means.items() if abs(r - rate) <= 2.01]
    if not best:
        return 0.0, 1.0
    low, high = min(best), max(best)
    top = min(max(highest), max(high + (high - low) / 3, float(np.quantile(nearby, 0.9))))
    margin = 0.06 * (top - low) or 0.1
    return low - margin, top + 2 * margin  # more above: room for the marks of diverged runs


def loss_against_step(variants: Sequence[Variant]) -> Figure:
    """Training loss against step for all widths at one learning rate and, below it, the differences of neighbouring widths."""
    rows, columns = _grid(len(variants))
    figure = Figure(figsize=(max(5.5, 3.2 * columns + 0.4), 4.4 * rows + 0.5))
    panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    colours = _colours(variants)
    for at, variant in enumerate(variants):
        upper, lower = panels[2 * (at // columns) :, at % columns][:2]
        rate = variant.order.rate
        upper.set_title(_title(variant) + ("" if rate is None else f"\nat learning rate $2^{{{rate:.4g}}}$"))
        upper.sharex(lower)
        upper.tick_params(labelbottom=False)
        lower.set_xlabel("step")
        if at % columns == 0:
            upper.set_ylabel("training loss, nats a token")
            lower.set_ylabel("wider less narrower")
        _curves(upper, variant.order, colours)
        _differences(lower, variant.order, colours)
    for at in range(len(variants), rows * columns):
        for axes in panels[2 * (at // columns) :, at % columns][:2]:
            axes.remove()
    marks = [Line2D([], [], linestyle=":", color="#555555", linewidth=1.0, label="2 x noise of seeds")]
    if any(not variant.order.better for variant in variants):
        marks.append(Line2D([], [], linestyle="none", marker="v", color=WRONG, markersize=4, label="wider is worse"))
    _legend(figure, colours, marks)
    return figure


def _curves(axes: Axes, order: Order, colours: dict[int, Any]) -> None:
    top, bottom = -math.inf, math.inf
    for width, (steps, mean, spread) in order.curves.items():
        shown = _finite(mean)
        axes.plot(steps, shown, color=colours[width])
        axes.fill_between(steps, shown - spread, shown + spread, color=colours[width], alpha=0.2, linewidth=0)
        kept = mean[np.isfinite(mean)]
        if kept.size:  # the first loss is the top: a run that blows up later must not flatten the others
            top, bottom = max(top, kept[0]), min(bottom, kept.min())
    if top > bottom:
        margin = 0.05 * (top - bottom)
        axes.set_ylim(bottom - margin, top + margin)


def _differences(axes: Axes, order: Order, colours: dict[int, Any]) -> None:
    """A line for each pair, in the colour of the wider; what is in the wrong order is marked."""
    axes.axhline(0, color="black", linewidth=0.9)
    shown = [_finite(pair.difference) for pair in order.pairs]
    for pair, difference in zip(order.pairs, shown, strict=True):
        steps, colour, wrong = np.array(pair.steps), colours[pair.wide], ~pair.holds
        axes.plot(steps, difference, color=colour, linewidth=1.3)
        axes.axhline(2 * pair.noise, color=colour, linestyle=":", linewidth=1.0)
        axes.plot(steps[wrong], difference[wrong], "v", color=WRONG, markersize=4, zorder=4)
        beyond = steps[wrong & np.isnan(difference)]
        axes.plot(beyond, np.full(len(beyond), EDGE), "v", color=WRONG, markersize=4, transform=axes.get_xaxis_transform())
    drawn = np.concatenate([*shown, [2 * pair.noise for pair in order.pairs], [0.0]])
    low, high = np.nanmin(drawn), np.nanmax(drawn)
    margin = 0.1 * (high - low) or 1e-3
    axes.set_ylim(low - margin, high + margin)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _grid(n: int) -> tuple[int, int]:
    rows = -(-n // COLUMNS)
    return rows, -(-n // rows)


def _title(variant: Variant) -> str:
    name = textwrap.fill(variant.name + (" (control)" if variant.control else ""), 34)
    return name.replace("$", r"\$")  # or matplotlib would read mathematics


def _colours(variants: Sequence[Variant]) -> dict[int, Any]:
    # Ordered in lightness, the widest the darkest; the palest part of the scale cannot be seen on white.
    return shades(sorted({width for variant in variants for width in variant.widths}))


def shades(ascending: Sequence[int]) -> dict[int, Any]:
    """A colour for each, pale to dark."""
    scale = matplotlib.colormaps["viridis_r"]
    return {key: scale(0.18 + 0.82 * at / max(1, len(ascending) - 1)) for at, key in enumerate(ascending)}


def _legend(figure: Figure, colours: dict[int, Any], marks: list[Line2D]) -> None:
    widths = [Line2D([], [], color=colour, label=f"width {width}") for width, colour in colours.items()]
    figure.legend(handles=widths + marks, loc="outside lower center", ncols=max(2, round(figure.get_figwidth() / 1.9)))
