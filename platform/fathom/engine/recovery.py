"""Going on with another deep stage when one is lost."""

from __future__ import annotations

from fathom.engine.completions import Completions
from fathom.engine.deep import DeepLost, DeepStage
from fathom.engine.scheduler import Scheduler
from fathom.types import FinishReason


def recover(deep: DeepStage, scheduler: Scheduler, completions: Completions) -> None:
    """Go on with another deep stage, which rebuilds its keys and values from exit states.

    Where states were never here (those of a cached prefix), the sequence is recomputed from its
    tokens. Tokens that were shown stay, drafts and decisions too; nothing is decided twice.
    Where there is no other stage, the requests end with an error. Nothing may be away any more.
    """
    for seq in reversed(list(scheduler.running)):
        if seq.finish_reason is not None:  # it only waited to be told of its last drafts
            completions.retire(seq)
        elif seq.states.start or (seq.scores is not None and not seq.scores.complete):
            scheduler.preempt(seq)
    try:
        deep.reopen()
    except DeepLost as error:
        for seq in completions.every():
            seq.retriable = True
            completions.end(seq, FinishReason.ERROR, f"no deep stage is left: {error}")
        return
    for seq in scheduler.running:
        scheduler.rebuild_deep(seq)
