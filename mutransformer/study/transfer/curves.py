"""The figures of a transfer report."""

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mutransformer.mup.checks.runs import short
from mutransformer.mup.checks.transfer import SizeFit, Variant
from mutransformer.mup.checks.width_ordering import WidthOrdering
from mutransformer.study.figures import remove, shades

COLUMNS = 3  # of panels of a transfer report, at most: a README shows a figure at a width of about 900 pixels
EDGE = 0.97  # the height, within a panel, of marks for values beyond it
WRONG: dict[str, Any] = {"linestyle": "none", "marker": "v", "color": "#d6272a", "markersize": 4}
TUNED: dict[str, Any] = {"linestyle": ":", "color": "#888888", "linewidth": 1.2}
OPTIMUM: dict[str, Any] = dict(linestyle="none", marker="D", markersize=6, markeredgecolor="black", markeredgewidth=0.9)
AHEAD: dict[str, Any] = {"marker": "o", "markersize": 4}
BEHIND: dict[str, Any] = {"linestyle": "--", "linewidth": 1.1, "alpha": 0.75, "zorder": 1}
BEHIND_OPTIMUM: dict[str, Any] = {"linestyle": "none", "marker": "D", "markersize": 4, "markerfacecolor": "white", "zorder": 4}
DIVERGED: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 5.5, "markeredgewidth": 1.5}


def loss_against_rate(variants: Sequence[Variant]) -> Figure:
    """Validation loss against log2(LR): a panel for each variant, a line for each size, all on one scale of losses."""
    rows, columns = _grid(len(variants))
    figure = Figure(figsize=(max(5.0, 3.2 * columns + 0.4), 2.9 * rows + 0.6))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    colors = shades(sorted({size for variant in variants for size in variant.sizes}))
    for axes, variant in zip(panels.flat, variants, strict=False):
        axes.set(title=_title(variant), xlabel="log2(learning rate)", ylim=loss_range(variants))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        if variant.tuned is not None:
            axes.axvline(variant.tuned, **TUNED, zorder=1)
        spacing = min(np.diff(variant.rates)) / (2 * len(variant.fits))
        for at, (size, fit) in enumerate(variant.fits.items()):
            # Marks of sizes that diverge at the same rate are drawn side by side.
            _rate_line(axes, fit, colors[size], (at - (len(variant.fits) - 1) / 2) * spacing)
    remove(panels.flat[len(variants) :])
    for axes in panels[:, 0]:
        axes.set_ylabel("validation loss, nats per token")
    marks = [Line2D([], [], **OPTIMUM, color="#bbbbbb", label="vertex of the parabola")]
    marks.append(Line2D([], [], **TUNED, label=f"best at the smallest {variants[0].axis.name}"))
    if any(variant.diverged for variant in variants):
        marks.append(Line2D([], [], **DIVERGED, color="#555555", label="diverged"))
    _legend(figure, variants, colors, marks)
    return figure


def _rate_line(axes: Axes, fit: SizeFit, color: Any, offset: float) -> None:
    rates, means = np.array(list(fit.losses)), np.array(list(fit.losses.values()))
    spreads = np.array([fit.cells[rate].spread or 0.0 for rate in fit.losses])
    _band(axes, rates, means, spreads, color, marker="o", markersize=3.5)
    lost = rates[np.isinf(means)] + offset
    axes.plot(lost, np.full(len(lost), EDGE), **DIVERGED, color=color, transform=axes.get_xaxis_transform())
    at = fit.optimum
    if at.loss is not None:
        style = OPTIMUM | {"color": color, "ecolor": "black", "capsize": 2, "zorder": 5}
        axes.errorbar([at.low], [at.loss], xerr=at.uncertainty, **style)


def loss_range(variants: Sequence[Variant]) -> tuple[float, float]:
    """Limits that show the lowest losses and their neighborhood, not losses far above them."""
    fits = [(fit, fit.best) for variant in variants for fit in variant.fits.values()]
    means = [({r: x for r, x in fit.losses.items() if math.isfinite(x)}, best) for fit, best in fits if best is not None]
    if not means:
        return 0.0, 1.0
    best, highest = [losses[rate] for losses, rate in means], [max(losses.values()) for losses, _ in means]
    nearby = [loss for losses, best_rate in means for rate, loss in losses.items() if abs(rate - best_rate) <= 2.01]
    low, high = min(best), max(best)
    top = min(max(highest), max(high + (high - low) / 3, float(np.quantile(nearby, 0.9))))
    margin = 0.06 * (top - low) or 0.1
    return low - margin, top + 2 * margin  # more above: room for the marks of diverged runs


def transfer(subject: Variant, control: Variant | None) -> Figure:
    """Validation loss against the learning rate in one panel: a line for each size of the subject, and the control's behind them.

    Diamonds mark the optima. The legend is beside the panel.
    """
    variants = [subject] if control is None else [subject, control]
    figure = Figure(figsize=(7.0, 4.2))
    axes = figure.subplots()
    colors = shades(sorted({size for variant in variants for size in variant.sizes}))
    for variant in variants:
        for size, fit in variant.fits.items():
            line: dict[str, Any] = BEHIND if variant is control else AHEAD
            shown = [loss if math.isfinite(loss) else math.nan for loss in fit.losses.values()]
            axes.plot(list(fit.losses), shown, color=colors[size], **line)
            mark: dict[str, Any] = BEHIND_OPTIMUM if variant is control else OPTIMUM | {"zorder": 5}
            if fit.optimum.loss is not None:
                axes.plot([fit.optimum.low], [fit.optimum.loss], **mark, color=colors[size])
    rates = [rate for variant in variants for rate in variant.rates]
    ticks = list(range(math.ceil(min(rates)), math.floor(max(rates)) + 1))
    axes.set_xticks(ticks, [f"$2^{{{tick}}}$" for tick in ticks])
    axes.set(xlabel="learning rate", ylabel="validation loss, nats per token", ylim=loss_range(variants))
    sizes = [Line2D([], [], color=colors[size], linewidth=2.4, label=short(size)) for size in colors]
    marks = [Line2D([], [], **AHEAD, color="#444444", label=_title(subject, width=24))]
    if control is not None:
        marks.append(Line2D([], [], **BEHIND, color="#444444", label=_title(control, width=24)))
    marks.append(Line2D([], [], **OPTIMUM, color="#bbbbbb", label="optimum"))
    columns, beside = 1 if len(sizes) <= 6 else 2, partial(axes.legend, borderaxespad=0.0)
    upper = beside(handles=sizes, title=subject.axis.name, ncols=columns, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axes.add_artist(upper)
    beside(handles=marks, loc="lower left", bbox_to_anchor=(1.01, 0.0))
    return figure


def loss_against_step(variants: Sequence[Variant]) -> Figure:
    """Training loss against step for all widths at one learning rate and, below it, the differences of adjacent widths.

    The widths of every variant must have been compared.
    """
    rows, columns = _grid(len(variants))
    figure = Figure(figsize=(max(5.5, 3.2 * columns + 0.4), 4.4 * rows + 0.5))
    panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    colors = shades(sorted({size for variant in variants for size in variant.sizes}))
    uppers, lowers = panels[::2].flat, panels[1::2].flat
    for variant, upper, lower in zip(variants, uppers, lowers, strict=False):
        ordering = _ordering(variant)
        upper.set_title(_title(variant, ordering.rate))
        upper.sharex(lower)
        upper.tick_params(labelbottom=False)
        lower.set_xlabel("step")
        _curves(upper, ordering, colors)
        _differences(lower, ordering, colors)
    for upper, lower in zip(panels[::2, 0], panels[1::2, 0], strict=True):
        upper.set_ylabel("training loss, nats per token")
        lower.set_ylabel("wider minus narrower")
    remove([*uppers[len(variants) :], *lowers[len(variants) :]])
    marks = [Line2D([], [], linestyle=":", color="#555555", linewidth=1.0, label="2 × seed noise")]
    if any(_ordering(variant).held < _ordering(variant).compared for variant in variants):
        marks.append(Line2D([], [], **WRONG, label="wider is worse, beyond that"))
    _legend(figure, variants, colors, marks)
    return figure


def _ordering(variant: Variant) -> WidthOrdering:
    assert variant.ordering is not None, "loss_against_step is drawn over widths only"
    return variant.ordering


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
        axes.plot(steps, 2 * pair.noise, color=color, linestyle=":", linewidth=1.0)
        axes.plot(steps[wrong], difference[wrong], **WRONG, zorder=4)
        beyond = steps[wrong & np.isnan(difference)]
        axes.plot(beyond, np.full(len(beyond), EDGE), **WRONG, transform=axes.get_xaxis_transform())
    drawn = np.concatenate([*shown, *(2 * pair.noise for pair in ordering.pairs), [0.0]])
    low, high = np.nanmin(drawn), np.nanmax(drawn)
    margin = 0.1 * (high - low) or 1e-3
    axes.set_ylim(low - margin, high + margin)


def _band(axes: Axes, x: Any, mean: np.ndarray, spread: np.ndarray, color: Any, **line: Any) -> None:
    """A line, interrupted where it is not finite, with a band of ± spread."""
    shown = np.where(np.isfinite(mean), mean, np.nan)
    axes.plot(x, shown, color=color, **line)
    axes.fill_between(x, shown - spread, shown + spread, color=color, alpha=0.2, linewidth=0)


def _grid(n: int) -> tuple[int, int]:
    rows = -(-n // COLUMNS)
    return rows, -(-n // rows)


def _title(variant: Variant, rate: float | None = None, width: int = 34) -> str:
    title = textwrap.fill(variant.title, width).replace("$", r"\$")  # matplotlib would read $ as mathematics
    return title if rate is None else f"{title}\nat learning rate $2^{{{rate:.4g}}}$"


def _legend(figure: Figure, variants: Sequence[Variant], colors: dict[int, Any], marks: list[Line2D]) -> None:
    sizes = [Line2D([], [], color=color, label=variants[0].axis.label(size)) for size, color in colors.items()]
    figure.legend(handles=sizes + marks, loc="outside lower center", ncols=max(2, round(figure.get_figwidth() / 1.9)))
