"""Confidence of the shallow stage in its draft."""

from __future__ import annotations

import torch


def softmax_gap(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Difference of the two largest probabilities, FREE's default confidence (free.md).

    Args:
        logits: [rows, vocabulary] float; at least two columns.

    Returns:
        the gap, [rows] float32 in [0, 1], NaN where a row has a NaN or no finite total, which no
        policy takes for confidence; and the index of the best column, [rows] int64.
    """
    logits = logits.float()
    total = torch.logsumexp(logits, dim=-1)
    # Two max reductions beat topk(2) on a 49,152-token vocabulary on CPU.
    best, index = logits.max(dim=-1)
    second = logits.scatter(-1, index[:, None], float("-inf")).amax(dim=-1)
    gap = (best - total).exp() - (second - total).exp()
    return torch.where(torch.isfinite(total), gap, torch.nan), index


def entropy(logits: torch.Tensor) -> float:
    """Entropy of one row's distribution, in nats.

    Args:
        logits: [vocabulary] float.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    return float(-(log_p.exp() * log_p).nan_to_num().sum())
