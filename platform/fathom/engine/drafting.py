"""Does drafting pay? Where it does not, a mode goes to full depth until it does."""

from __future__ import annotations

from collections.abc import Iterable

from fathom.engine import sampling
from fathom.engine.live_costs import Costs
from fathom.engine.sequence import Sequence
from fathom.types import AcceptMode, PolicyName

_WINDOW = 1024
"""Latest decisions of the exit head, about, that its rates are taken from."""

_MIN_DECISIONS = 64
"""No judgement before so many."""

_FEW_DECISIONS = 8
"""Judged anew after so many: a judgement takes tens of microseconds."""

_LONGEST_ROUND = 9

_IN_STEP = 0.9
"""Share of the rate of ``DraftRule.gain`` that several sequences reach, which do not keep step:
0.85 to 0.97 of it at 2 to 16 sequences of the default model."""

FREE_TO_PAUSE = (PolicyName.THRESHOLD, PolicyName.ADAPTIVE)
"""Policies whose exits nobody has asked for as such."""

_BAND = 0.02
"""Half the gap between the gain that ends a pause and the one that starts it."""

_SCOUTS, _SCOUT_TOKENS = 32, 16
"""One sequence in so many drafts its first tokens in a pause, so that a change is noticed."""

MAX_LAG = 1024
"""Rows without keys in the exit layers after which a sequence drafts no more: their exit states
are kept to catch up from."""

CATCH_UP_ROWS = 64
"""Rows that a pass may take beside its own, to catch up with in the exit layers."""


class DraftRule:
    """Compares tokens a second with and without drafts, at the costs and exit rates of now.

    In a round each of n sequences drafts until the exit policy keeps one of its tokens, then all
    stacks are flushed. With ``e`` the share of rows that exit and ``a`` the share of drafts that
    the deep stage agrees with, the row after j drafts exists with probability e^j and makes a token
    if all drafts before it were right, (e a)^j. The best round of J steps makes

        n * sum_j (e a)^j  tokens in  sum_j P_j t_s(n e^j / P_j) + t_d(n * sum_j e^j)  seconds,

    P_j = 1 - (1 - e^j)^n the probability that step j is run at all, and full depth makes n tokens
    in t_s,full(n) + t_d(n). Seconds of both stages are added also where they run side by side: what
    is compared is what a token costs the cluster.

    Args:
        all_stand: drafts are tokens whatever the deep stage says, a = 1, as in mode ``free``.
    """

    def __init__(self, costs: Costs, *, all_stand: bool = False) -> None:
        self._costs = costs
        self._all_stand = all_stand
        self._rows = self._exits = self._judged = self._agreed = 0.0
        self._paused = False
        self._asked = (-1, -1)

    @property
    def paused(self) -> bool:
        """Whether drafting did not pay when it was last asked for."""
        return self._paused

    def decided(self, *, exited: bool) -> None:
        """Note one row of the exit head."""
        self._rows += 1
        self._exits += exited
        if self._rows > _WINDOW:  # half the weight for what is older
            self._rows, self._exits = self._rows / 2, self._exits / 2
            self._judged, self._agreed = self._judged / 2, self._agreed / 2

    def judged(self, *, agreed: bool) -> None:
        """Note what the deep stage says of one draft."""
        self._judged += 1
        self._agreed += agreed

    def gain(self, sequences: int) -> float:
        """Expected tokens/s with drafts over those without, for so many sequences at once."""
        exit_share = self._exits / max(self._rows, 1)
        agreed = 1.0 if self._all_stand else (self._agreed + 1) / (self._judged + 1)
        costs, n = self._costs, max(sequences, 1)
        seconds = rows = tokens = best = 0.0
        left, right = 1.0, 1.0
        for _ in range(_LONGEST_ROUND):
            run = 1 - (1 - left) ** n
            if run < 1e-3:
                break
            seconds += run * costs.shallow(n * left / run)
            rows += n * left
            tokens += n * right
            best = max(best, tokens / (seconds + costs.deep(rows)))
            left, right = left * exit_share, right * exit_share * agreed
        full = n / (costs.shallow_full(n) + costs.deep(n))
        return best / full * (1 if n == 1 else _IN_STEP)

    def pause(self, sequences: int) -> bool:
        """Decide for a step with so many sequences; a pause ends later than it began."""
        asked = (sequences, int(self._rows) // _FEW_DECISIONS)
        if self._rows >= _MIN_DECISIONS and asked != self._asked:
            self._asked = asked
            self._paused = self.gain(sequences) < 1 + (_BAND if self._paused else -_BAND)
        return self._paused


class DraftRules:
    """A rule for each mode that drafts and can do without."""

    def __init__(self, costs: Costs) -> None:
        self._rules = {
            AcceptMode.EXACT: DraftRule(costs),
            AcceptMode.ROLLBACK: DraftRule(costs),
            AcceptMode.FREE: DraftRule(costs, all_stand=True),
        }

    @property
    def paused(self) -> bool:
        """Whether drafting did not pay in one of the modes when it was last asked for."""
        return any(rule.paused for rule in self._rules.values())

    def of(self, mode: AcceptMode) -> DraftRule | None:
        """The rule of a mode, or None."""
        return self._rules.get(mode)

    def pauses(self, modes: Iterable[AcceptMode], sequences: int) -> frozenset[AcceptMode]:
        """Those of the modes that do not draft in a step with so many sequences."""
        asked = ((mode, self._rules.get(mode)) for mode in modes)
        return frozenset(mode for mode, rule in asked if rule and rule.pause(sequences))


def may_pause(seq: Sequence) -> bool:
    """Whether a sequence may go to full depth instead of drafting.

    In ``exact`` nobody sees it from the tokens. In ``rollback`` and ``free`` tokens are the full
    model's meanwhile.
    """
    request = seq.request
    if request.compute.policy not in FREE_TO_PAUSE:  # somebody wants these very exits
        return False
    # Equal in distribution is not equal: the same seed must give the same tokens at any load.
    return sampling.is_greedy(request.sampling) or request.sampling.seed is None


def is_scout(seq: Sequence) -> bool:
    """Whether a sequence drafts in a pause too."""
    return scouts(seq.seq_id, len(seq.tokens) - seq.num_prompt)


def scouts(number: int, tokens: int) -> bool:
    """``is_scout`` of the sequence of that number, after so many tokens."""
    return number % _SCOUTS == 0 and tokens < _SCOUT_TOKENS
