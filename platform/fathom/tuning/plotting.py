"""How figures look: one style, colours that all eyes can tell apart, files without a screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#8c8c8c"
COLORS = (BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#E69F00")
"""Of Okabe and Ito (2008), the strong ones first."""


@contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style; figures keep what they were made with.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.rcsetup import cycler

    with rc_context(
        {
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=COLORS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "figure.constrained_layout.use": True,
            "font.size": 12,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "savefig.dpi": 150,
        }
    ):
        yield


def panels(count: int, *, width: float = 6.4, height: float = 4.8) -> tuple[Figure, list[Any]]:
    """A figure with so many plots side by side, each so many inches wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height))
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def name_points(plot: Any, x: ArrayLike, y: ArrayLike, names: Sequence[str]) -> None:
    """Write names right of n points, pushed apart where they would cover one another.

    The plot's limits must be set. A thin line leads from a point to a name that was pushed off.
    """
    places = plot.transAxes.inverted().transform(
        plot.transData.transform(np.column_stack([np.asarray(x), np.asarray(y)]))
    )
    taken: list[tuple[float, float]] = []
    for number in np.argsort(places[:, 1]):
        across, up = places[number]
        while any(abs(across - a) < 0.06 and abs(up - u) < 0.05 for a, u in taken):
            up += 0.01
        taken.append((across, up))
        plot.annotate(
            names[number],
            places[number],
            xytext=(across + 0.035, up),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=11,
            fontweight="bold",
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
        )


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, by Agg, which needs no screen; returns the path."""
    figure.savefig(path, format="png")
    return path
