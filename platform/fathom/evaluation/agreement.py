"""How well the exit head foretells the deep stage, over every decision row, drafted or not.

The engine reports verified drafts only, which the threshold has chosen. Who measures every row is
a ``Probe``; without one these figures are unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fathom.types import Request

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

Drafts = Sequence[tuple[float, bool]]
"""Of each decision row: the draft's confidence, and whether the deep stage chooses the same."""

Probe = Callable[["Engine", Sequence[Request]], Drafts]
"""Runs the requests (mode full, greedy) with every row drafted and verified."""


def agreement(drafts: Drafts) -> float | None:
    """Share of rows whose draft is the deep stage's choice; None without rows."""
    return sum(agrees for _, agrees in drafts) / len(drafts) if drafts else None


def coverage_at_precision(drafts: Drafts, precision: float = 0.95) -> float | None:
    """Most rows, as a share, that one threshold lets leave with at least this precision.

    Returns:
        0 where no threshold does; None without rows.
    """
    if not drafts:
        return None
    confidence = np.array([each for each, _ in drafts])
    order = np.argsort(-confidence, kind="stable")
    confidence = confidence[order]
    good = np.cumsum([drafts[place][1] for place in order])
    count = np.arange(1, len(order) + 1)
    # A threshold takes all rows of equal confidence or none.
    last_of_its_kind = np.append(confidence[:-1] > confidence[1:], True)
    places = np.flatnonzero((good >= precision * count) & last_of_its_kind)
    return float(count[places[-1]] / len(order)) if len(places) else 0.0
