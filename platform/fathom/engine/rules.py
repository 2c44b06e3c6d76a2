"""The rules of an engine that go by what passes cost: when to draft, and when to flush."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Rows

from fathom.engine.costs import StageCosts
from fathom.engine.drafting import DraftRule, DraftRules, is_scout, may_pause
from fathom.engine.flush_rules import FlushRule, FlushWhen
from fathom.engine.live_costs import LiveCosts, LiveCurve
from fathom.engine.scheduler import ShallowWork
from fathom.engine.sequence import Sequence
from fathom.types import AcceptMode


class Rules:
    """When an engine drafts and when it flushes, at the costs that its passes have now.

    Args:
        measured: costs at the start. pause_drafting: whether modes go to full depth while drafting
            does not pay. flush_when: which flush rule.
        on_gpu: passes are over only when somebody reads what they computed.
        deep_here: whether the deep stage's time can be seen: elsewhere others use it too.

    Attributes:
        costs: as they are now.
    """

    def __init__(
        self,
        measured: StageCosts,
        *,
        pause_drafting: bool,
        flush_when: FlushWhen,
        on_gpu: bool = False,
        deep_here: bool = True,
    ) -> None:
        self.costs = LiveCosts(measured)
        self.drafts = DraftRules(self.costs) if pause_drafting else None
        self._flush = FlushRule(self.costs, flush_when)
        self._on_gpu = on_gpu
        self._deep_here = deep_here

    def pauses(self, running: Iterable[Sequence]) -> frozenset[AcceptMode]:
        """Modes that draft nothing in this step."""
        if self.drafts is None:
            return frozenset()
        modes = [seq.request.compute.mode for seq in running]
        return self.drafts.pauses(set(modes), len(modes))

    def pauses_for(self, seq: Sequence, running: int) -> bool:
        """Whether a sequence that begins beside so many others would not draft now."""
        if self.drafts is None or not seq.request.compute.drafts:
            return False
        mode = seq.request.compute.mode
        paused = mode in self.drafts.pauses((mode,), running + 1)
        return paused and may_pause(seq) and not is_scout(seq) and seq.shadow is None

    def of(self, seq: Sequence) -> DraftRule | None:
        """The rule by which the sequence's mode drafts, if there is one."""
        return None if self.drafts is None else self.drafts.of(seq.request.compute.mode)

    def drafted(self, work: Rows[ShallowWork], decided: Rows[Sequence], seconds: float) -> None:
        """Note a shallow pass: its work, who decided a token in it, and what it took."""
        self._flush.drafted(len(decided))
        rows = len(work)
        if not rows or len(decided) < rows or any(item.num_rows > 1 for item in work):
            return  # prompts, and rows beside them, are not what was measured
        asked = sum(not math.isnan(seq.pending[-1].confidence) for seq in decided)
        if asked == rows:
            _observe(self.costs.shallow, rows, seconds)
        elif not asked and not self._on_gpu:
            _observe(self.costs.shallow_full, rows, seconds)

    def flush_now(self, running: Iterable[Sequence]) -> bool:
        """Whether those that wait for the deep stage get it now."""
        waiting = drafting = 0
        for seq in running:
            waiting += seq.is_flushable
            drafting += seq.is_drafting
        return self._flush.flush_now(waiting, drafting)

    def flushed(self, chosen: Rows[tuple[Sequence, int]], seconds: float) -> None:
        """Note a flush: whose rows, and what it took until they were on their way or back."""
        self._flush.flushed()
        if self._deep_here and all(_is_decoding(seq, rows) for seq, rows in chosen):
            _observe(self.costs.deep, sum(rows for _, rows in chosen), seconds)

    def figures(self) -> dict[str, float]:
        """What the metrics tell of the rules."""
        paused = self.drafts is not None and self.drafts.paused
        return {"drafting_paused": float(paused), "cost_drift": self.costs.drift}


def _is_decoding(seq: Sequence, rows: int) -> bool:
    """Whether a flush's share holds decisions alone, all of which layers run over."""
    return seq.deep_len >= seq.num_prompt and not seq.copied_rows(seq.deep_len, rows)


def _observe(curve: LiveCurve, rows: int, seconds: float) -> None:
    if rows <= curve.most_rows:  # beyond, curves are guesses
        curve.observe(rows, seconds)
