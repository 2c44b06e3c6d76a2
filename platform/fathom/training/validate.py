"""How well the exit predicts the full path, on rows that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fathom.exits.confidence import softmax_gap
from fathom.exits.coverage import coverage_at_precision
from fathom.training.examples import IGNORED, Batch
from fathom.training.model import ShallowDeep


@dataclass(slots=True)
class Drafts:
    """What the exit would draft at each row, one entry a row, in the examples' order.

    Attributes:
        confidence: [n] float32 softmax gap. agree: [n] bool, draft = the full path's choice.
        sequence: [n] int64, which example. domain: of each example.
    """

    confidence: Tensor
    agree: Tensor
    sequence: Tensor
    domain: tuple[str, ...] = field(default=())

    def of(self, domain: str) -> Drafts:
        """The rows of one domain."""
        chosen = torch.tensor([name == domain for name in self.domain])[self.sequence]
        return Drafts(
            self.confidence[chosen], self.agree[chosen], self.sequence[chosen], self.domain
        )

    @property
    def agreement(self) -> float:
        """Share of all rows whose draft is the full path's choice."""
        return self.agree.float().mean().item() if len(self.agree) else float("nan")

    def coverage(self, precision: float) -> float:
        """The most rows, as a share, that one threshold lets go with at least this precision."""
        return coverage_at_precision(self.confidence, self.agree, precision)[0]

    def above(self, threshold: float) -> tuple[float, float]:
        """Share of rows whose confidence exceeds a threshold, and of those, that agree."""
        confident = self.confidence > threshold
        if not bool(confident.any()):
            return 0.0, float("nan")
        return confident.float().mean().item(), self.agree[confident].float().mean().item()


@torch.no_grad()
def deep_choices(model: ShallowDeep, batches: Sequence[Batch]) -> list[Tensor]:
    """The full path's greedy choice at every row with a label: [rows] int64 a batch."""
    found = []
    for batch in batches:
        rows = batch.labels != IGNORED
        states = model(batch.token_ids, rows, deep=True)
        # In slices: logits of a whole batch would take more memory than the model.
        parts = model.norm(states.deep).split(256)
        found.append(torch.cat([model.lm_head(part).argmax(-1) for part in parts]))
    return found


@torch.no_grad()
def draft(
    model: ShallowDeep,
    batches: Sequence[Batch],
    choices: Sequence[Tensor],
    weight: Tensor,
    token_ids: Tensor,
) -> Drafts:
    """Draft at every row.

    Args:
        choices: from ``deep_choices``. weight: [subset, d] LM-head rows of ``token_ids`` [subset].
    """
    confidence, agree, sequence, domain = [], [], [], []
    number = 0
    for batch, choice in zip(batches, choices, strict=True):
        rows = batch.labels != IGNORED
        states = model(batch.token_ids, rows, deep=False)
        logits = model.head(states.exit).to(weight.dtype) @ weight.T
        gap, column = softmax_gap(logits.float())
        confidence.append(gap)
        agree.append(token_ids[column] == choice)
        owner = torch.arange(len(batch.examples))[:, None].expand_as(rows)[rows]
        sequence.append(owner + number)
        number += len(batch.examples)
        domain += [example.domain for example in batch.examples]
    return Drafts(torch.cat(confidence), torch.cat(agree), torch.cat(sequence), tuple(domain))


def figures(drafts: Drafts, prefix: str = "heldout") -> dict[str, float]:
    """Agreement, and coverage at 95% precision, of all rows and by domain, under metric names."""
    found: dict[str, float] = {}
    for name, part in [("", drafts), *((d, drafts.of(d)) for d in sorted(set(drafts.domain)))]:
        tag = f"{prefix}_{name}" if name else prefix
        found[f"{tag}_agreement"] = part.agreement
        found[f"{tag}_coverage_at_precision_95"] = part.coverage(0.95)
    return found
