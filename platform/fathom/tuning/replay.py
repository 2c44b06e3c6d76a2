"""Decoding replayed over a trace: what each mode would make of its rows, at measured costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fathom.bench.ideal import Costs
from fathom.engine.drafting import DraftRule, scouts
from fathom.tuning.rows import Floats, TraceRows
from fathom.types import AcceptMode


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted decoding of one sequence at a time, at one threshold.

    Attributes:
        speedup: over mode ``full``. wrong: share of the output's tokens that are not the full
            model's. exits: share of them that were decided at the exit.
    """

    threshold: float
    speedup: float
    wrong: float
    exits: float


def replay(
    confidence: Sequence[float],
    agrees: Sequence[bool],
    fine: Sequence[bool],
    ends: Sequence[int],
    costs: Costs,
    mode: AcceptMode,
    threshold: float,
    *,
    cap: int,
    rule: DraftRule | None = None,
) -> Prediction:
    """Replay the rows as one sequence at a time would be decoded, and add up measured costs.

    Confidences and agreement come from the full model's own contexts. That is right in mode
    ``exact`` up to the first rejected draft; what was drafted behind it is thrown away, and its
    amount is estimated by the true continuation. In ``free`` contexts drift after a wrong token:
    only first-order errors are counted.

    As in the engine, the row behind a full stack is not asked and joins its flush, and a mode that
    holds drafts decides a sequence's first token at full depth.

    Args:
        confidence, agrees: [n], sequences one after the other, each in the order of its positions.
        fine: [n], whether ``mode`` keeps a draft at this row; ``free`` keeps all.
        ends: row behind the last of each sequence.
        cap: most drafts a flush.
        rule: a new one, of an engine that drafts only where that pays.
    """
    holds = mode is not AcceptMode.FREE
    full = costs.shallow_full(1) + costs.deep(1)
    seconds, tokens, wrong, exits, at = 0.0, 0, 0, 0, 0
    for number, end in enumerate(ends):
        first = at
        while at < end:
            paused = rule is not None and rule.pause(1) and not scouts(number, at - first)
            drafts = not paused and not (holds and at == first)
            stop = at
            while drafts and stop < end and stop - at < cap and confidence[stop] > threshold:
                stop += 1
            # The row behind the drafts joins the flush and gets the deep answer.
            rows = stop - at + (stop < end)
            if paused:
                seconds += full
            else:
                seconds += rows * costs.shallow(1) + costs.deep(rows)
            kept = rows
            if holds:
                kept = next((i - at + 1 for i in range(at, stop) if not fine[i]), rows)
            judged = range(at, min(stop, at + kept))
            left = [i for i in judged if fine[i] or not holds]
            if rule is not None and drafts:
                for _ in range(at, stop):
                    rule.decided(exited=True)
                if stop - at < cap and stop < end:
                    rule.decided(exited=False)
                for i in judged:
                    rule.judged(agreed=fine[i])
            exits += len(left)
            wrong += sum(not agrees[i] for i in left)
            tokens += kept
            at += kept
    count = max(tokens, 1)
    return Prediction(threshold, full * tokens / seconds, wrong / count, exits / count)


def replay_trace(
    rows: TraceRows, confidence: Floats, mode: AcceptMode, threshold: float, *, cap: int = 8
) -> Prediction:
    """``replay`` over a trace; a draft of ``exact`` and ``rollback`` is kept where it agrees.

    Args:
        confidence: [n] of the rows. cap: see ``replay``.
    """
    order = np.lexsort((rows.position, rows.groups))
    groups = rows.groups[order]
    ends = [*(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    agrees = rows.agrees[order].tolist()
    return replay(
        confidence[order].tolist(), agrees, agrees, ends, rows.source.costs, mode, threshold,
        cap=cap,
    )  # fmt: skip
