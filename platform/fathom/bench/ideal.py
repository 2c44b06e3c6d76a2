"""The speed-up that adaptive depth could give if nothing but the stages took time."""

from __future__ import annotations

import random
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


def in_step_speedup(costs: Costs, *, batch: int, exit_rate: float, max_stack: int) -> float:
    """Speed-up over mode ``full`` if all sequences stopped at the same step (free.md).

    A full step over B rows costs t(B) = shallow_full(B) + deep(B). With the shallow fraction
    s = shallow(B) / t(B) (exit head included), k tokens a flush and sequence, and
    r = deep(B k) / deep(B), the cost of k rows a sequence over that of one:

        1 / (s + deep(B) / t(B) * r / k)

    For one sequence this is the ideal. Several sequences stop at different steps, which makes it
    a bound that no flush rule can reach.
    """
    k = tokens_per_flush(exit_rate, max_stack)
    full = costs.shallow_full(batch) + costs.deep(batch)
    shallow_fraction = costs.shallow(batch) / full
    growth = costs.deep(batch * k) / costs.deep(batch)
    return 1 / (shallow_fraction + costs.deep(batch) / full * growth / k)


def ideal_speedup(
    costs: Costs, *, batch: int, exit_rate: float, max_stack: int, rounds: int = 3000
) -> float:
    """Speed-up over mode ``full`` of the best flush rule for sequences that stop independently.

    For one sequence, ``in_step_speedup``. For B, sequences that exit at random at the run's own
    rate are played through under each rule "flush when m of them wait", m = 1 ... B, with passes
    that cost what was measured and nothing else; the best rule counts. Prefill, drafts that are
    rejected, sampling and the engine's own work are not in it: they are what measured over ideal
    shows, and so is a flush rule that is not the best.

    Args:
        rounds: flushes played for each rule; the draws are the same at every call.
    """
    if batch == 1:
        return in_step_speedup(costs, batch=1, exit_rate=exit_rate, max_stack=max_stack)
    chance = exit_probability(exit_rate, max_stack)
    full = (costs.shallow_full(batch) + costs.deep(batch)) / batch
    seconds = min(
        _seconds_per_token(costs, batch, chance, max_stack, flush_at, rounds)
        for flush_at in range(1, batch + 1)
    )
    return full / seconds


def exit_probability(exit_rate: float, max_stack: int) -> float:
    """The chance p of an exit a token that gives this exit rate under the stack's cap c.

    A sequence decides k = 1 + p + ... + p^c tokens a flush, and the exit rate is 1 - 1/k.
    """
    wanted = tokens_per_flush(exit_rate, max_stack)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(middle**i for i in range(max_stack + 1)) < wanted:
            low = middle
        else:
            high = middle
    return high


def _seconds_per_token(
    costs: Costs, batch: int, chance: float, max_stack: int, flush_at: int, rounds: int
) -> float:
    rng = random.Random(0)
    drafts = [0] * batch
    waiting: list[int] = []
    drafting = list(range(batch))
    seconds, tokens, flushes = 0.0, 0, 0
    while flushes < rounds:
        seconds += costs.shallow(len(drafting))
        going_on = []
        for i in drafting:
            if drafts[i] < max_stack and rng.random() < chance:
                drafts[i] += 1
                going_on.append(i)
            else:
                waiting.append(i)
        drafting = going_on
        if len(waiting) >= flush_at or not drafting:
            rows = sum(drafts[i] + 1 for i in waiting)
            seconds += costs.deep(rows)
            tokens += rows
            flushes += 1
            for i in waiting:
                drafts[i] = 0
            drafting += waiting
            waiting = []
    return seconds / tokens
