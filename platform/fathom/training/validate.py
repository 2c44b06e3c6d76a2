"""How well the exit predicts the full path, on rows that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fathom.exits.confidence import softmax_gap
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

    def above(self, threshold: float) -> tuple[float, float]:
        """Share of rows whose confidence exceeds a threshold, and of those, that agree."""
        confident = self.confidence > threshold
        if not bool(confident.any()):
            return 0.0, float("nan")
        return confident.float().mean().item(), self.agree[confident].float().mean().item()


def coverage_at_precision(drafts: Drafts, precision: float) -> tuple[float, float]:
    """The most rows that one threshold can let go with at least this precision.

    Returns:
        share of rows above the threshold, and the threshold; (0, 1) where there is none.
    """
    if not len(drafts.confidence):
        return 0.0, 1.0
    order = drafts.confidence.argsort(descending=True)
    confidence, agree = drafts.confidence[order], drafts.agree[order]
    count = torch.arange(1, len(order) + 1)
    good = agree.cumsum(0) >= precision * count
    # A threshold takes all rows of equal confidence or none.
    last_of_its_kind = torch.ones_like(good)
    last_of_its_kind[:-1] = confidence[:-1] > confidence[1:]
    places = (good & last_of_its_kind).nonzero().flatten()
    if not len(places):
        return 0.0, 1.0
    place = int(places[-1])
    threshold = confidence[place + 1].item() if place + 1 < len(order) else 0.0
    return (place + 1) / len(order), threshold


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
        found[f"{tag}_coverage_at_precision_95"] = coverage_at_precision(part, 0.95)[0]
    return found
