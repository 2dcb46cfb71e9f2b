"""Heat maps of the layers' sizes: a panel for each activation or weight, layers upwards, steps to the right."""

import math
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Float

from mutransformer.training.layer_sizes import Layout

COLUMNS = 400  # the most steps that are kept to be drawn
OCTAVES = 3.0  # from the middle of the color scale to its ends
PANELS = 4  # in a row

TITLES = {
    "activation": "RMS of activations",
    "gradient": "RMS of gradients, before clipping",
    "weight": "RMS of weights",
    "update": "RMS of updates",
    "update_to_weight": "RMS of updates / RMS of their weights",
    "update_to_expected": "RMS of updates / what learning rate and parametrization predict",
}
STYLE: list[Any] = [
    "default",  # ignores the user's matplotlibrc
    {"font.size": 9.5, "axes.titlesize": 9.5, "figure.titlesize": 11.5, "figure.constrained_layout.use": True},
]


class History:
    """The sizes of at most COLUMNS steps, equally spaced: once there are more, every other one is dropped."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._rows: list[Mapping[str, Any]] = []
        self._seen, self._stride = 0, 1

    def add(self, step: int, sizes: Mapping[str, Any]) -> None:
        if self._seen % self._stride == 0:
            self.steps.append(step)
            self._rows.append(sizes)
        self._seen += 1
        if len(self.steps) > COLUMNS:
            self.steps, self._rows, self._stride = self.steps[::2], self._rows[::2], 2 * self._stride

    def values(self, quantity: str, name: str) -> Float[np.ndarray, "layers steps"]:
        """Of one activation or weight; one row if it is not in a layer. NaN where it was not measured."""
        columns = [row.get(quantity, {}).get(name, math.nan) for row in self._rows]
        height = max(len(column) if isinstance(column, list) else 1 for column in columns)
        return np.array([np.broadcast_to(np.array(column, float), height) for column in columns]).T


def heat_map(history: History, quantity: str, layout: Layout) -> bytes:
    """A PNG of one quantity. Colors show factors relative to the median of a panel, which its title states; those of
    update_to_expected are relative to 1. Needs matplotlib.
    """
    import matplotlib  # an extra
    import matplotlib.style
    from matplotlib.figure import Figure

    names = layout.names(quantity)
    inside, outside = ([name for name in names if names[name] == within] for within in (True, False))
    rows = math.ceil((len(inside) + bool(outside)) / PANELS)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(11.5, 1.2 + rows * min(3.2, 1.15 + 0.11 * layout.n_layer)), dpi=110)
        panels = list(figure.subplots(rows, PANELS, squeeze=False).flat)
        colors = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#c8c8c8")
        image = None
        for axes, name in zip(panels, inside, strict=False):
            values = history.values(quantity, name)
            image = axes.imshow(_octaves(values, _middle(quantity, values)), **_LOOK, cmap=colors)
            role = f" ({layout.roles[name]})" if name in layout.roles else ""
            axes.set_title(f"{_words(name)}{role}\nmedian {_number(_median(values))}")
            axes.set_yticks(range(0, layout.n_layer, -(-layout.n_layer // 6)))
        if outside:
            axes = panels[len(inside)]
            values = np.concatenate([history.values(quantity, name) for name in outside])
            middles = np.array([[_middle(quantity, row)] for row in values])
            image = axes.imshow(_octaves(values, middles), **_LOOK, cmap=colors)
            axes.set_title("outside the layers:\neach with its median")
            axes.set_yticks([])
            for i, (name, row) in enumerate(zip(outside, values, strict=True)):
                label = f"{_words(name)}: {_number(_median(row))}"
                axes.text(0.03, i, label, transform=axes.get_yaxis_transform(), va="center", bbox=_LABEL)
        shown = len(inside) + bool(outside)
        for axes in panels[:shown]:
            at = sorted({0, len(history.steps) // 2, len(history.steps) - 1})
            axes.set_xticks(at, [str(history.steps[i]) for i in at])
        for axes in panels[shown:]:
            axes.remove()
        figure.suptitle(TITLES[quantity])
        figure.supxlabel("step", fontsize=9.5)
        figure.supylabel("layer", fontsize=9.5)
        assert image is not None
        factors = range(-int(OCTAVES), int(OCTAVES) + 1)
        bar = figure.colorbar(image, ax=panels[:shown], aspect=40, fraction=0.03, pad=0.01, extend="both")
        bar.set_ticks(list(factors), labels=[f"x {2**i}" if i >= 0 else f"x 1/{2**-i}" for i in factors])
        bar.set_label("relative to 1" if quantity == "update_to_expected" else "relative to the median of the panel")
        file = BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


_LOOK: dict[str, Any] = {
    "aspect": "auto",
    "origin": "lower",
    "interpolation": "nearest",
    "vmin": -OCTAVES,
    "vmax": OCTAVES,
}


_LABEL: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 2}


def _octaves(values: np.ndarray, middle: Any) -> np.ndarray:
    """log2(values / middle), masked where that is not finite."""
    with np.errstate(all="ignore"):
        return np.ma.masked_invalid(np.log2(values / middle))


def _median(values: np.ndarray) -> float:
    """Of what a log scale can show; NaN if there is none of it."""
    shown = values[np.isfinite(values) & (values > 0)]
    return float(np.median(shown)) if shown.size else math.nan


def _middle(quantity: str, values: np.ndarray) -> float:
    return 1.0 if quantity == "update_to_expected" else _median(values)


def _words(name: str) -> str:
    return name.replace("_", " ") if not name.startswith(("w_", "b_")) else name


def _number(value: float) -> str:
    return f"{value:.2g}"
