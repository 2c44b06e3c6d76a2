"""How well the exit head foretells the deep stage, over every decision row, drafted or not.

The engine reports verified drafts only, which the threshold has chosen. Who measures every row is
a ``Probe``; without one these figures are unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fathom.engine.trace import DraftRecord
from fathom.exits.coverage import coverage_at_precision
from fathom.types import Request

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

Drafts = Sequence[DraftRecord]
"""Of each decision row what the exit head drafted, and what the deep stage chose."""

Probe = Callable[["Engine", Sequence[Request]], Drafts]
"""Runs the requests (mode full, greedy) with every row drafted and verified."""


def agreement(drafts: Drafts) -> float | None:
    """Share of rows whose draft is the deep stage's choice; None without rows."""
    return sum(draft.agrees for draft in drafts) / len(drafts) if drafts else None


def coverage(drafts: Drafts, precision: float = 0.95) -> float | None:
    """See ``fathom.exits.coverage``: the share alone; None without rows."""
    if not drafts:
        return None
    confidence = torch.tensor([draft.confidence for draft in drafts])
    agrees = torch.tensor([draft.agrees for draft in drafts])
    return coverage_at_precision(confidence, agrees, precision)[0]
