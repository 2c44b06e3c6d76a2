"""Parallel coordinates: one line a trial over axes of their own, choices as ticks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom.tuning.plotting import GREY, panels
from fathom.tuning.rows import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NONE_AT = -0.12
"""Where a line passes an axis that its trial does not have."""

_SPREAD = 0.05
"""Of lines through one choice, so that they can be told apart."""


def parallel_coordinates(
    columns: Mapping[str, Sequence[Any]],
    colored_by: Sequence[float],
    *,
    strong: Sequence[bool],
    faint: Sequence[bool],
    title: str,
    legend: str,
) -> Figure:
    """Draw lines of n trials.

    Args:
        columns: by the axis's label, n values: numbers, or words (choices); None where a trial
            does not have it.
        colored_by: n numbers. strong: n, lines to be drawn over the others; faint: n, in grey.
        legend: what the colours are.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, (plot,) = panels(1, width=2.2 + 1.25 * len(columns), height=5.2)
    places = np.stack([_axis(plot, at, values) for at, values in enumerate(columns.values())], 1)
    values = np.asarray(colored_by)
    # From the fifth percentile on: one bad trial would make all the others look alike.
    scale = Normalize(float(np.quantile(values, 0.05)), float(values.max()))
    colors = colormaps["viridis_r"]
    axes = np.arange(len(columns))
    for number in np.lexsort((values, np.asarray(strong))):  # the strong ones last, on top
        look: dict[str, Any] = {
            "color": colors(scale(values[number])),
            "linewidth": 2.4 if strong[number] else 1.0,
            "alpha": 0.95 if strong[number] else 0.35,
        }
        if faint[number]:
            look = {"color": GREY, "linewidth": 0.8, "alpha": 0.4, "linestyle": ":"}
        plot.plot(axes, places[number], solid_joinstyle="round", **look)
    plot.set_xticks(axes, list(columns), fontsize=11)
    plot.set_yticks([])
    plot.set(xlim=(-0.3, len(columns) - 0.6), ylim=(-0.2, 1.06), title=title)
    plot.grid(visible=False)
    plot.tick_params(length=0)
    for side in ("left", "bottom"):
        plot.spines[side].set_visible(False)
    bar = figure.colorbar(ScalarMappable(scale, colors), ax=plot, extend="min", pad=0.02)
    bar.set_label(f"{legend}; thick: the front")
    return figure


def _axis(plot: Any, at: int, values: Sequence[Any]) -> Floats:
    """Draw an axis with its ticks; returns where the n lines cross it, [n]."""
    known = [value for value in values if value is not None]
    words = sorted({value for value in known if isinstance(value, str)})
    low, high = (0.0, 1.0) if words else (float(min(known)), float(max(known)))
    if words:
        ticks = {word: (place + 0.5) / len(words) for place, word in enumerate(words)}
    else:
        ticks = {f"{value:.4g}": place for value, place in ((low, 0.0), (high, 1.0))}
    plot.plot([at, at], [0, 1], color="0.25", linewidth=1.2, zorder=3)
    back = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
    for label, place in ticks.items():
        plot.text(at + 0.04, place, label, fontsize=10, va="center", zorder=5, bbox=back)
    if len(known) < len(values):
        plot.text(at, _NONE_AT - 0.045, "none", fontsize=9, ha="center", color="0.35", zorder=5)
    found = np.empty(len(values))
    for number, value in enumerate(values):
        spread = _SPREAD * (number * 0.618 % 1 - 0.5)
        if value is None:
            found[number] = _NONE_AT + spread / 2
        elif words:
            found[number] = ticks[value] + spread
        else:
            found[number] = (value - low) / ((high - low) or 1)
    return found
