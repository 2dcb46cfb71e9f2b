"""The figures of all studies, their style and colors, and PNG and SVG files with reproducible bytes."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mutransformer.errors import ConfigError
from mutransformer.mup.checks.slopes import SlopeFit
from mutransformer.mup.checks.transfer import Variant, WidthFit
from mutransformer.mup.checks.width_ordering import WidthOrdering
from mutransformer.study.sweep.grid import Axis

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
    "default",  # ignores the user's matplotlibrc
    {
        **{"font.size": 9.5, "axes.titlesize": 10, "legend.fontsize": 9, "legend.frameon": False},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8"},
        **{"axes.axisbelow": True, "lines.linewidth": 1.6, "figure.constrained_layout.use": True},
        **{"svg.hashsalt": "mutransformer", "savefig.dpi": 160},
    },
]
TITLES = {"size": "mean |x|", "change": "mean |change of x since the start|", "update": "mean |update of the weight|"}
CONTROL: dict[str, Any] = {"color": "#9a9a9a", "linestyle": "--", "linewidth": 1.0, "zorder": 1}
COLUMNS = 3  # of panels of a transfer report, at most: a README shows a figure at a width of about 900 pixels
EDGE = 0.97  # the height, within a panel, of marks for values beyond it
WRONG: dict[str, Any] = {"linestyle": "none", "marker": "v", "color": "#d6272a", "markersize": 4}
TUNED: dict[str, Any] = {"linestyle": ":", "color": "#888888", "linewidth": 1.2}
OPTIMUM: dict[str, Any] = dict(linestyle="none", marker="D", markersize=6, markeredgecolor="black", markeredgewidth=0.9)
DIVERGED: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 5.5, "markeredgewidth": 1.5}


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
    _remove(panels.flat[len(names) :])
    figure.supxlabel(axis)
    figure.supylabel(TITLES[fits[0].kind])
    marks = [Line2D([], [], color=colors[step], label=f"{step}") for step in steps]
    if control is not None:
        marks.append(Line2D([], [], **CONTROL, label=f"control: {control}"))
    title = f"{subject}, updates done"
    figure.legend(handles=marks, title=title, loc="outside upper center", ncols=len(marks), columnspacing=1.0)
    return figure


def loss_against_rate(variants: Sequence[Variant]) -> Figure:
    """Validation loss against log2(LR): a panel for each variant, a line for each width, all on one scale of losses."""
    rows, columns = _grid(len(variants))
    figure = Figure(figsize=(max(5.0, 3.2 * columns + 0.4), 2.9 * rows + 0.6))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    colors = shades(sorted({width for variant in variants for width in variant.widths}))
    for axes, variant in zip(panels.flat, variants, strict=False):
        axes.set(title=_title(variant), xlabel="log2(learning rate)", ylim=loss_range(variants))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        if variant.tuned is not None:
            axes.axvline(variant.tuned, **TUNED, zorder=1)
        spacing = min(np.diff(variant.rates)) / (2 * len(variant.fits))
        for at, (width, fit) in enumerate(variant.fits.items()):
            # Marks of widths that diverge at the same rate are drawn side by side.
            _rate_line(axes, fit, colors[width], (at - (len(variant.fits) - 1) / 2) * spacing)
    _remove(panels.flat[len(variants) :])
    for axes in panels[:, 0]:
        axes.set_ylabel("validation loss, nats per token")
    marks = [Line2D([], [], **OPTIMUM, color="#bbbbbb", label="vertex of the parabola")]
    marks.append(Line2D([], [], **TUNED, label="best at the narrowest width"))
    if any(variant.diverged for variant in variants):
        marks.append(Line2D([], [], **DIVERGED, color="#555555", label="diverged"))
    _legend(figure, colors, marks)
    return figure


def _rate_line(axes: Axes, fit: WidthFit, color: Any, offset: float) -> None:
    rates, cells = np.array(list(fit.cells)), fit.cells.values()
    means = np.array([cell.mean for cell in cells])
    _band(axes, rates, means, np.array([cell.spread or 0.0 for cell in cells]), color, marker="o", markersize=3.5)
    lost = rates[np.isinf(means)] + offset
    axes.plot(lost, np.full(len(lost), EDGE), **DIVERGED, color=color, transform=axes.get_xaxis_transform())
    at = fit.optimum
    if at.loss is not None:
        style = OPTIMUM | {"color": color, "ecolor": "black", "capsize": 2, "zorder": 5}
        axes.errorbar([at.low], [at.loss], xerr=at.stderr, **style)


def loss_range(variants: Sequence[Variant]) -> tuple[float, float]:
    """Limits that show the lowest losses and their neighborhood, not losses far above them."""
    fits = [(fit, fit.best) for variant in variants for fit in variant.fits.values()]
    means = [({r: c.mean for r, c in fit.cells.items() if not c.diverged}, best) for fit, best in fits if best is not None]
    if not means:
        return 0.0, 1.0
    best, highest = [losses[rate] for losses, rate in means], [max(losses.values()) for losses, _ in means]
    nearby = [loss for losses, best_rate in means for rate, loss in losses.items() if abs(rate - best_rate) <= 2.01]
    low, high = min(best), max(best)
    top = min(max(highest), max(high + (high - low) / 3, float(np.quantile(nearby, 0.9))))
    margin = 0.06 * (top - low) or 0.1
    return low - margin, top + 2 * margin  # more above: room for the marks of diverged runs


def loss_against_step(variants: Sequence[Variant]) -> Figure:
    """Training loss against step for all widths at one learning rate and, below it, the differences of adjacent widths."""
    rows, columns = _grid(len(variants))
    figure = Figure(figsize=(max(5.5, 3.2 * columns + 0.4), 4.4 * rows + 0.5))
    panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    colors = shades(sorted({width for variant in variants for width in variant.widths}))
    uppers, lowers = panels[::2].flat, panels[1::2].flat
    for variant, upper, lower in zip(variants, uppers, lowers, strict=False):
        upper.set_title(_title(variant, variant.ordering.rate))
        upper.sharex(lower)
        upper.tick_params(labelbottom=False)
        lower.set_xlabel("step")
        _curves(upper, variant.ordering, colors)
        _differences(lower, variant.ordering, colors)
    for upper, lower in zip(panels[::2, 0], panels[1::2, 0], strict=True):
        upper.set_ylabel("training loss, nats per token")
        lower.set_ylabel("wider minus narrower")
    _remove([*uppers[len(variants) :], *lowers[len(variants) :]])
    marks = [Line2D([], [], linestyle=":", color="#555555", linewidth=1.0, label="2 × seed noise")]
    if any(not variant.ordering.better for variant in variants):
        marks.append(Line2D([], [], **WRONG, label="wider is worse"))
    _legend(figure, colors, marks)
    return figure


def _curves(axes: Axes, ordering: WidthOrdering, colors: dict[int, Any]) -> None:
    top, bottom = -math.inf, math.inf
    for width, (steps, mean, spread) in ordering.curves.items():
        _band(axes, steps, mean, spread, colors[width])
        finite = mean[np.isfinite(mean)]
        if finite.size:  # the first loss is the top: a run that diverges later must not flatten the others
            top, bottom = max(top, finite[0]), min(bottom, finite.min())
    if top > bottom:
        margin = 0.05 * (top - bottom)
        axes.set_ylim(bottom - margin, top + margin)


def _differences(axes: Axes, ordering: WidthOrdering, colors: dict[int, Any]) -> None:
    """A line for each pair, in the color of the wider; marks where the wider is worse by more than the noise allows."""
    axes.axhline(0, color="black", linewidth=0.9)
    shown = [np.where(np.isfinite(pair.difference), pair.difference, np.nan) for pair in ordering.pairs]
    for pair, difference in zip(ordering.pairs, shown, strict=True):
        steps, color, wrong = np.array(pair.steps), colors[pair.wide], ~pair.holds
        axes.plot(steps, difference, color=color, linewidth=1.3)
        axes.axhline(2 * pair.noise, color=color, linestyle=":", linewidth=1.0)
        axes.plot(steps[wrong], difference[wrong], **WRONG, zorder=4)
        beyond = steps[wrong & np.isnan(difference)]
        axes.plot(beyond, np.full(len(beyond), EDGE), **WRONG, transform=axes.get_xaxis_transform())
    drawn = np.concatenate([*shown, [2 * pair.noise for pair in ordering.pairs], [0.0]])
    low, high = np.nanmin(drawn), np.nanmax(drawn)
    margin = 0.1 * (high - low) or 1e-3
    axes.set_ylim(low - margin, high + margin)


def _band(axes: Axes, x: Any, mean: np.ndarray, spread: np.ndarray, color: Any, **line: Any) -> None:
    """A line, interrupted where it is not finite, with a band of ± spread."""
    shown = np.where(np.isfinite(mean), mean, np.nan)
    axes.plot(x, shown, color=color, **line)
    axes.fill_between(x, shown - spread, shown + spread, color=color, alpha=0.2, linewidth=0)


def _remove(unused: Iterable[Axes]) -> None:
    for axes in unused:
        axes.remove()


def _grid(n: int) -> tuple[int, int]:
    rows = -(-n // COLUMNS)
    return rows, -(-n // rows)


def _title(variant: Variant, rate: float | None = None) -> str:
    title = textwrap.fill(variant.title, 34).replace("$", r"\$")  # matplotlib would read $ as mathematics
    return title if rate is None else f"{title}\nat learning rate $2^{{{rate:.4g}}}$"


def _legend(figure: Figure, colors: dict[int, Any], marks: list[Line2D]) -> None:
    widths = [Line2D([], [], color=color, label=f"width {width}") for width, color in colors.items()]
    figure.legend(handles=widths + marks, loc="outside lower center", ncols=max(2, round(figure.get_figwidth() / 1.9)))
