"""Losses of shallow-deep training (free.md; Bae et al., 2023). All are computed in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def subset_cross_entropy(logits: Tensor, labels: Tensor, outside: float) -> Tensor:
    """Cross entropy of a head that scores a part of the vocabulary, mean over rows.

    Args:
        logits: [n, subset] float32. labels: [n] int64 columns, -1 where the subset lacks the
            token. Those rows are drawn to the uniform distribution with weight ``outside``: the
            head cannot be right there, so it should not be confident.
    """
    known = labels >= 0
    loss = F.cross_entropy(logits[known], labels[known], reduction="sum")
    if outside and not bool(known.all()):
        lost = logits[~known]
        loss = loss + outside * (lost.logsumexp(-1) - lost.mean(-1)).sum()
    return loss / max(len(labels), 1)


def soft_cross_entropy(logits: Tensor, target: Tensor, outside: float) -> Tensor:
    """Cross entropy to the full path's probabilities, mean over rows (Hinton et al., 2015).

    Args:
        logits: [n, subset] float32. target: [n, subset] float32 probabilities of the subset's
            tokens; what a row lacks to 1 lies outside, and draws the head to the uniform
            distribution with weight ``outside``, as in ``subset_cross_entropy``.
    """
    spread = logits.logsumexp(-1)
    known = target.sum(-1)
    inside = known * spread - (target * logits).sum(-1)
    lost = (1 - known).clamp(min=0) * (spread - logits.mean(-1))
    return (inside + outside * lost).mean()


def weighted(shallow: Tensor, deep: Tensor, exit_layer: int, num_layers: int) -> Tensor:
    """(L_S CE_S + L_D CE_D) / (L_S + L_D): free.md, "Training loss"."""
    return (exit_layer * shallow + num_layers * deep) / (exit_layer + num_layers)


def kd_last(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE(h_LD, h_LS) of final-normed states [n, d]; the teacher gets no gradient."""
    return F.mse_loss(student.float(), teacher.float().detach())


def unif_pairs(exit_layer: int, num_layers: int) -> list[tuple[int, int]]:
    """(student, teacher) layers of ``unif``: teachers evenly spaced over all layers.

    For 24 layers and 6 students the teachers are 4, 8, ..., 24 (0-based 3, 7, ..., 23).
    """
    return [(s, round(s * num_layers / exit_layer)) for s in range(1, exit_layer + 1)]


def kd_unif(states: Mapping[int, Tensor], exit_layer: int, num_layers: int) -> Tensor:
    """Mean over the pairs of ``unif_pairs`` of MSE, teachers detached.

    Args:
        states: layer -> [n, d] final-normed states, every layer of a pair.
    """
    pairs = unif_pairs(exit_layer, num_layers)
    return torch.stack([kd_last(states[s], states[t]) for s, t in pairs]).mean()


def kd_dyna(states: Mapping[int, Tensor], students: Sequence[int]) -> Tensor:
    """MSE between each teacher and its nearest student, in order: free.md, "dyna".

    Walks the teachers (layers above the students) from last to first; each takes the student of
    least MSE among those below the one taken before. Ends where no student is left.

    Args:
        states: layer -> [n, d] final-normed states.
    """
    teachers = sorted((layer for layer in states if layer > max(students)), reverse=True)
    left = sorted(students)
    found: list[Tensor] = []
    for teacher in teachers:
        if not left:
            break
        losses = torch.stack([kd_last(states[student], states[teacher]) for student in left])
        best = int(losses.argmin())
        found.append(losses[best])
        left = left[:best]
    return torch.stack(found).mean()


def hold(current: Tensor, original: Tensor) -> Tensor:
    """KL(original || current), mean over rows: keeps the full path what it was.

    Args:
        current, original: [n, vocabulary] logits; the original's get no gradient.
    """
    target = F.log_softmax(original.float().detach(), -1)
    return F.kl_div(
        F.log_softmax(current.float(), -1), target, log_target=True, reduction="batchmean"
    )
