"""What a head would do on held-out rows: agreement, confidence, and predicted speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fathom.training.rows import Rows
from fathom.training.train import TrainableHead

# Thresholds tried, and shares of wrong tokens that mode ``free`` may be allowed.
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
WRONG_BUDGETS = (0.01, 0.02, 0.05)


@dataclass(slots=True)
class Drafts:
    """What a head would draft on rows. Each [n]: agree bool, gap float32 in [0, 1], sequence."""

    agree: Tensor
    gap: Tensor
    sequence: Tensor


@torch.inference_mode()
def draft(
    head: TrainableHead, rows: Rows, ranked_weight: Tensor, ranked: Tensor, sizes: Sequence[int]
) -> dict[int, Drafts]:
    """Drafts with the first ``size`` tokens of the ranking, for every size at one product.

    Args:
        ranked_weight: [vocab, d] float32, LM-head rows in the order of ``ranked`` [vocab].
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {size: [] for size in sizes}
    for start in range(0, len(rows.argmax), 256):
        logits = head(rows.hidden[start : start + 256]) @ ranked_weight[: max(sizes)].T
        for size in sizes:
            part = logits[:, :size]
            top = part.topk(2, dim=-1)
            probability = (top.values - part.logsumexp(-1, keepdim=True)).exp()
            same = ranked[top.indices[:, 0]] == rows.argmax[start : start + 256]
            found[size].append((same, probability[:, 0] - probability[:, 1]))
    return {
        size: Drafts(torch.cat([a for a, _ in p]), torch.cat([g for _, g in p]), rows.sequence)
        for size, p in found.items()
    }


@dataclass(frozen=True, slots=True)
class Costs:
    """Prices in units of one layer at one row.

    Attributes:
        layers: of the whole model. vocab: size of the vocabulary. lm_head: price of all of it.
        row: price of each further row of a pass, as a share of the first.
    """

    layers: int
    vocab: int
    lm_head: float
    row: float = 0.05

    def shallow(self, k: int, subset: int) -> float:
        """One drafted row: k layers and the subset's share of the head."""
        return k + self.lm_head * subset / self.vocab

    def flush(self, k: int, rows: int) -> float:
        """One deep pass over ``rows`` rows."""
        return (self.layers - k + self.lm_head) * (1 + self.row * (rows - 1))

    @property
    def full(self) -> float:
        """One token of the whole model."""
        return self.layers + self.lm_head


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted decoding of the rows at one threshold.

    Attributes:
        threshold: confidence above which a draft is kept.
        speedup: full-model units over units spent, a token. per_flush: tokens a deep pass.
        wrong: share of emitted tokens that the whole model would not have chosen there.
    """

    threshold: float
    speedup: float
    per_flush: float
    wrong: float


def predict(
    drafts: Drafts, k: int, subset: int, costs: Costs, threshold: float, exact: bool, cap: int = 8
) -> Prediction:
    """Replay the rows as one sequence at a time would be decoded, and count units.

    Confidences and agreement come from the whole model's own contexts. That is right in mode
    ``exact`` up to the first rejected draft; the drafts behind it are thrown away, and their
    number is estimated by the confidences of the true continuation. In mode ``free`` contexts
    would drift after a wrong token: ``wrong`` counts first-order errors only.
    """
    agree, gap = drafts.agree.tolist(), drafts.gap.tolist()
    ends = torch.unique_consecutive(drafts.sequence, return_counts=True)[1].cumsum(0).tolist()
    units, tokens, flushes, wrong, at = 0.0, 0, 0, 0, 0
    for end in ends:
        while at < end:
            stop = at
            while stop < end and stop - at < cap and gap[stop] > threshold:
                stop += 1
            # The row that was not confident joins the flush and gets the deep answer.
            rows = stop - at + (1 if stop < end and stop - at < cap else 0)
            units += rows * costs.shallow(k, subset) + costs.flush(k, rows)
            flushes += 1
            misses = [i for i in range(at, stop) if not agree[i]]
            kept = misses[0] - at + 1 if exact and misses else rows
            wrong += 0 if exact else len(misses)
            tokens += kept
            at += kept
    return Prediction(
        threshold, costs.full * tokens / units, tokens / flushes, wrong / max(tokens, 1)
    )


def best_predictions(
    drafts: Drafts, k: int, subset: int, costs: Costs
) -> dict[str, Prediction | None]:
    """The fastest threshold of mode ``exact``, and of ``free`` within each of WRONG_BUDGETS.

    None where no threshold of the grid keeps the budget.
    """
    exact = [predict(drafts, k, subset, costs, t, exact=True) for t in GRID]
    free = [predict(drafts, k, subset, costs, t, exact=False) for t in GRID]
    best: dict[str, Prediction | None] = {"exact": max(exact, key=lambda p: p.speedup)}
    for budget in WRONG_BUDGETS:
        within = [p for p in free if p.wrong <= budget]
        best[f"free {budget:.0%}"] = max(within, key=lambda p: p.speedup, default=None)
    return best


def pool(parts: Sequence[Drafts]) -> Drafts:
    """Drafts of several domains as one."""
    return Drafts(
        torch.cat([p.agree for p in parts]),
        torch.cat([p.gap for p in parts]),
        torch.cat([p.sequence for p in parts]),
    )


@dataclass(slots=True)
class Evaluation:
    """Everything measured for one layer, variant and subset size.

    Attributes:
        drafts: by domain. best: ``best_predictions`` by domain, and of all chats as ``chats``.
    """

    k: int
    variant: str
    subset: int
    drafts: dict[str, Drafts]
    best: dict[str, dict[str, Prediction | None]]


def evaluate(
    heads: dict[str, TrainableHead],
    k: int,
    heldout: dict[str, Rows],
    lm_weight: Tensor,
    ranked: Tensor,
    sizes: Sequence[int],
    costs: Costs,
) -> list[Evaluation]:
    """Measure heads of one layer on held-out rows, at every subset size and the full vocabulary.

    Args:
        heads: by variant. heldout: by domain.
        lm_weight: [vocab, d]. ranked: [vocab] int64, most frequent token first.
    """
    ranked_weight = lm_weight[ranked].float()
    every = [*sizes, len(ranked)]
    found = []
    for variant, head in heads.items():
        by_domain = {
            domain: draft(head, rows, ranked_weight, ranked, every)
            for domain, rows in tqdm(heldout.items(), desc=f"evaluate {variant} {k}")
        }
        for size in every:
            drafts = {domain: sets[size] for domain, sets in by_domain.items()}
            # Plain text is measured, but nobody is served by it.
            chats = pool([d for name, d in drafts.items() if name != "classics"])
            groups = {**drafts, "chats": chats}
            best = {name: best_predictions(d, k, size, costs) for name, d in groups.items()}
            found.append(Evaluation(k, variant, size, drafts, best))
    return found
