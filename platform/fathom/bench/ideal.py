"""The speed-up that adaptive depth could give if nothing but the stages took time."""

from __future__ import annotations

from typing import Protocol


class Costs(Protocol):
    """Seconds of one pass by its number of rows (``fathom.engine.costs.StageCosts``)."""

    def shallow(self, rows: float) -> float:
        """Layers [0, k) and the exit head."""
        ...

    def shallow_full(self, rows: float) -> float:
        """Layers [0, k) alone."""
        ...

    def deep(self, rows: float) -> float:
        """Layers [k, L) and the LM head."""
        ...


def tokens_per_flush(exit_rate: float, max_stack: int) -> float:
    """Tokens that a sequence decides from one flush to the next, k.

    Of k tokens k - 1 left early and one needed the deep stage, so the exit rate is 1 - 1/k. The
    stack's cap bounds k however many exits there are.

    Args:
        exit_rate: share of tokens decided at the exit layer, in [0, 1].
        max_stack: most drafts that may wait for the deep stage.
    """
    if exit_rate >= 1:
        return float(max_stack + 1)
    return min(1 / (1 - exit_rate), float(max_stack + 1))


def ideal_speedup(costs: Costs, *, batch: int, exit_rate: float, max_stack: int) -> float:
    """Speed-up over mode ``full`` from stage costs alone (free.md, for a batch of sequences).

    A full step over B rows costs t(B) = shallow_full(B) + deep(B). With the shallow fraction
    s = shallow(B) / t(B) (exit head included), k tokens a flush and sequence, and
    r = deep(B k) / deep(B), the cost of k rows a sequence over that of one:

        ideal = 1 / (s + deep(B) / t(B) * r / k)

    Prefill, drafts that are rejected, sampling and the engine's own work are not in it: they are
    what measured over ideal shows.
    """
    k = tokens_per_flush(exit_rate, max_stack)
    full = costs.shallow_full(batch) + costs.deep(batch)
    shallow_fraction = costs.shallow(batch) / full
    growth = costs.deep(batch * k) / costs.deep(batch)
    return 1 / (shallow_fraction + costs.deep(batch) / full * growth / k)
