"""What the engine can tell of every draft: the food of calibration, policies and tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fathom.engine.sequence import Decision, Sequence


@dataclass(frozen=True, slots=True)
class DraftRecord:
    """One row at which the exit head spoke and the deep stage has answered.

    Attributes:
        request_id, index: which completion. position: of the row in the sequence; the token that
            it decides stands at ``position + 1``. num_prompt: prompt tokens of the sequence.
        confidence: softmax gap of the exit head. entropy: of its distribution, in nats.
        shallow_token: its best token. deep_token: the deep stage's choice at this row.
        exited: whether the exit policy let a draft go here.
    """

    request_id: str
    index: int
    position: int
    num_prompt: int
    confidence: float
    entropy: float
    shallow_token: int
    deep_token: int
    exited: bool

    @property
    def agrees(self) -> bool:
        """Whether the exit's best token is the deep stage's choice."""
        return self.shallow_token == self.deep_token


TraceListener = Callable[[DraftRecord], None]


def record_of(seq: Sequence, decision: Decision, deep_token: int) -> DraftRecord:
    """The record of a decision that the deep stage has answered."""
    return DraftRecord(
        request_id=seq.request.request_id,
        index=seq.index,
        position=decision.position,
        num_prompt=seq.num_prompt,
        confidence=decision.confidence,
        entropy=decision.entropy,
        shallow_token=decision.best,
        deep_token=deep_token,
        exited=decision.token is not None,
    )
