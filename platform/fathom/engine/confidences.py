"""How sure the exit is of its drafts, each by the measure that its request names."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fathom.exits.confidence import entropy_score, max_prob, saturation, softmax_gap
from fathom.exits.meta import MetaClassifier
from fathom.types import ComputePolicy, Confidence


@dataclass(frozen=True, slots=True)
class ExitRows:
    """Rows at which the exit head speaks.

    Attributes:
        logits: [rows, n] in the model's dtype, over the tokens that the head scores.
        states: [rows, d] exit states. earlier: [rows, d] the states one layer before, or None
            where nobody compares.
    """

    logits: torch.Tensor
    states: torch.Tensor
    earlier: torch.Tensor | None

    def part(self, rows: list[int]) -> ExitRows:
        """Some of the rows."""
        earlier = None if self.earlier is None else self.earlier[rows]
        return ExitRows(self.logits[rows], self.states[rows], earlier)


def confidences(
    computes: Sequence[ComputePolicy], rows: ExitRows, meta: MetaClassifier | None = None
) -> tuple[list[float], list[int]]:
    """Confidence of each row, by its own measure and temperature, and the best column.

    Rows of one measure and temperature are taken together, so that a batch of one kind, which is
    the rule, costs one pass over the logits.

    Args:
        computes: of each row's request. meta: needed by confidence ``meta``.

    Returns:
        confidences in [0, 1], NaN where the row is not finite; and columns of the logits.
    """
    groups: dict[tuple[Confidence, float], list[int]] = defaultdict(list)
    for row, compute in enumerate(computes):
        groups[compute.confidence, compute.exit_temperature].append(row)
    if len(groups) == 1:
        ((measure, temperature),) = groups
        return _measure(measure, temperature, rows, meta)
    scores, columns = [math.nan] * len(computes), [0] * len(computes)
    for (measure, temperature), own in groups.items():
        found = _measure(measure, temperature, rows.part(own), meta)
        for row, score, column in zip(own, *found, strict=True):
            scores[row], columns[row] = score, column
    return scores, columns


def _measure(
    measure: Confidence, temperature: float, rows: ExitRows, meta: MetaClassifier | None
) -> tuple[list[float], list[int]]:
    logits = rows.logits if temperature == 1 else rows.logits.float() / temperature
    if measure is Confidence.SOFTMAX_GAP:
        scores, columns = softmax_gap(logits)
        return scores.tolist(), columns.tolist()
    best, columns = logits.max(dim=-1)
    match measure:
        case Confidence.MAX_PROB:
            scores = max_prob(logits)
        case Confidence.ENTROPY:
            scores = entropy_score(logits)
        case Confidence.SATURATION:
            assert rows.earlier is not None
            scores = saturation(rows.states, rows.earlier)
        case Confidence.META:
            assert meta is not None
            scores = meta.confidence(rows.states)
    # A state can be finite where its logits are not; a NaN is the largest of a row.
    return torch.where(torch.isfinite(best), scores, torch.nan).tolist(), columns.tolist()
