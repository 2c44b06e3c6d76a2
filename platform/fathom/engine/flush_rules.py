"""When to flush: the rules by which an engine sends stacks to the deep stage.

No rule can make a sequence starve. One that waits keeps its place among ``max_num_seqs``, every
other one drafts at most ``max_stack`` tokens before it waits as well, and each rule flushes when
none drafts. Which rule it is shows in time and in depths, never in tokens of the modes ``full`` and
``exact``.
"""

from __future__ import annotations

from enum import StrEnum

from fathom.engine.live_costs import Costs


class FlushWhen(StrEnum):
    """When sequences that wait for the deep stage get it."""

    RATE = "rate"
    """When tokens come at a higher rate than by drafting on, at measured costs (``FlushRule``)."""

    FULL = "full"
    """When none can draft any more: the fewest deep passes, each of the most rows."""

    EAGER = "eager"
    """As soon as one waits: the most deep passes, and nobody waits for another's drafts."""


class FlushRule:
    """Flush now, or let the sequences that can still draft do so first?

    Between two flushes the sequences that have not stopped yet draft, fewer at every step, while
    the fixed part of the next deep pass is spread over more tokens. Under ``rate`` the marginal
    value theorem (Charnov, 1976) gives the time to stop: draft on while the next step alone makes
    tokens at a higher rate than the round so far would if it were flushed now. With N tokens made
    in T seconds of shallow steps since the last flush, and ``a`` sequences still drafting:

        draft on  iff  a / (t_s(a) + t_d(N + a) - t_d(N))  >  N / (T + t_d(N))

    Args:
        costs: seconds of the stages' passes. when: which rule.
    """

    def __init__(self, costs: Costs, when: FlushWhen = FlushWhen.RATE) -> None:
        self._costs = costs
        self._when = FlushWhen(when)
        self._tokens = 0
        self._seconds = 0.0

    def drafted(self, rows: int) -> None:
        """Note a shallow step in which ``rows`` sequences decided a token."""
        if rows:
            self._tokens += rows
            self._seconds += self._costs.shallow(rows)

    def flushed(self) -> None:
        """Note a flush: a new round begins."""
        self._tokens = 0
        self._seconds = 0.0

    def flush_now(self, waiting: int, drafting: int) -> bool:
        """Decide.

        Args:
            waiting: sequences that cannot go on without the deep stage.
            drafting: sequences whose next shallow row decides a token.
        """
        if waiting == 0:
            return False
        if drafting == 0 or self._when is FlushWhen.EAGER:
            return True
        return self._when is FlushWhen.RATE and self._drafting_pays_less(drafting)

    def _drafting_pays_less(self, drafting: int) -> bool:
        deep, tokens = self._costs.deep, self._tokens
        now = tokens / (self._seconds + deep(max(tokens, 1)))
        step = self._costs.shallow(drafting) + deep(tokens + drafting) - deep(max(tokens, 1))
        return drafting / step <= now
