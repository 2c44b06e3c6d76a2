"""What the engine can tell of every draft: the food of calibration, policies and tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fathom.engine.confidences import ExitRows
from fathom.engine.sequence import Decision
from fathom.engine.sequence import Sequence as Completion
from fathom.exits.calibration import TEMPERATURES as TEMPERATURES
from fathom.exits.confidence import max_prob, saturation, softmax_gap


@dataclass(frozen=True, slots=True)
class Notes:
    """What the exit head said at one row, noted where the engine is traced.

    Attributes:
        softmax_gap, max_prob, saturation: confidences at temperature 1 (see
            ``fathom.exits.confidence``). entropy: of the head's distribution, in nats.
        best_logit, second_logit: the two largest logits.
        lse: log of the summed exponentials of all logits, each divided by a temperature, for each
            of ``fathom.exits.calibration.TEMPERATURES``. With the logits above and that of the
            deep stage's choice they give the gap and the loss at these temperatures.
        logits: [n] over the tokens that the head scores, in the model's dtype; kept until the deep
            stage has answered.
        hidden: [d] the exit state, in the model's dtype, or None where nobody wants it.
    """

    softmax_gap: float
    max_prob: float
    saturation: float
    entropy: float
    best_logit: float
    second_logit: float
    lse: tuple[float, ...]
    logits: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DraftRecord:
    """One row at which the exit head spoke and the deep stage has answered.

    Attributes:
        request_id, index: which completion. position: of the row in the sequence; the token that
            it decides stands at ``position + 1``. num_prompt: prompt tokens of the sequence.
        confidence: softmax gap of the exit head. entropy: of its distribution, in nats.
        shallow_token: its best token. deep_token: the deep stage's choice at this row.
        exited: whether the exit policy let a draft go here.
        probe: whether the policy would have let it go, but for a probe.
        max_prob, saturation, best_logit, second_logit, lse: see ``Notes``.
        deep_logit: the exit head's logit of the deep stage's choice; -inf where it scores no such
            token.
        hidden: [d] the exit state in float16, little-endian, or None where nobody wants it.
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
    probe: bool = False
    max_prob: float = math.nan
    saturation: float = math.nan
    best_logit: float = math.nan
    second_logit: float = math.nan
    deep_logit: float = math.nan
    lse: tuple[float, ...] = ()
    hidden: bytes | None = None

    @property
    def agrees(self) -> bool:
        """Whether the exit's best token is the deep stage's choice."""
        return self.shallow_token == self.deep_token


TraceListener = Callable[[DraftRecord], None]


def take_notes(rows: ExitRows, *, hidden: bool) -> Sequence[Notes]:
    """Note what the exit head says at each row.

    Args:
        rows: with the states one layer before. hidden: whether the exit states are kept.
    """
    assert rows.earlier is not None
    scores = rows.logits.float()
    log_p = torch.log_softmax(scores, dim=-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(dim=-1)
    best = scores.topk(2, dim=-1).values
    lse = torch.stack([torch.logsumexp(scores / t, dim=-1) for t in TEMPERATURES], dim=1)
    columns = zip(
        softmax_gap(scores)[0].tolist(),
        max_prob(scores).tolist(),
        saturation(rows.states, rows.earlier).tolist(),
        entropy.tolist(),
        best[:, 0].tolist(),
        best[:, 1].tolist(),
        map(tuple, lse.tolist()),
        rows.logits,
        rows.states if hidden else [None] * len(scores),
        strict=True,
    )
    return [Notes(*row) for row in columns]


def record_of(
    seq: Completion, decision: Decision, deep_token: int, column_of: Callable[[int], int | None]
) -> DraftRecord:
    """The record of a decision that the deep stage has answered.

    Args:
        column_of: column of the exit head that scores a token, or None.
    """
    notes = decision.notes
    assert notes is not None
    column = column_of(deep_token)
    hidden = notes.hidden
    return DraftRecord(
        request_id=seq.request.request_id,
        index=seq.index,
        position=decision.position,
        num_prompt=seq.num_prompt,
        confidence=notes.softmax_gap,
        entropy=notes.entropy,
        shallow_token=decision.best,
        deep_token=deep_token,
        exited=decision.token is not None,
        probe=decision.probe,
        max_prob=notes.max_prob,
        saturation=notes.saturation,
        best_logit=notes.best_logit,
        second_logit=notes.second_logit,
        deep_logit=-math.inf if column is None else float(notes.logits[column]),
        lse=notes.lse,
        hidden=None if hidden is None else hidden.cpu().half().numpy().astype("<f2").tobytes(),
    )
