"""Confidence of the shallow stage in its draft: scores in [0, 1], larger is surer.

A row without a finite total has no confidence: NaN, which no policy takes for confidence.
"""

from __future__ import annotations

import math

import torch


def softmax_gap(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Difference of the two largest probabilities, FREE's default confidence (free.md).

    Args:
        logits: [rows, vocabulary] float; at least two columns.

    Returns:
        the gap, [rows] float32 in [0, 1], NaN where a row has a NaN or no finite total, which no
        policy takes for confidence; and the index of the best column, [rows] int64.
    """
    # As few operations as there can be: each draft step waits for this, and at an exit head's few
    # thousand columns their number is what it costs. (argmax in bfloat16 takes 4 times as long as
    # topk.) Softmax gives NaN for the rows that have no confidence.
    columns = logits.topk(2, dim=-1).indices
    two = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(-1, columns)
    return two[:, 0] - two[:, 1], columns[:, 0]


def max_prob(logits: torch.Tensor) -> torch.Tensor:
    """The largest probability of each row, [rows] float32.

    Args:
        logits: [rows, vocabulary] float.
    """
    logits = logits.float()
    total = torch.logsumexp(logits, dim=-1)
    return torch.where(torch.isfinite(total), (logits.amax(dim=-1) - total).exp(), torch.nan)


def entropy_score(logits: torch.Tensor) -> torch.Tensor:
    """1 - H / log V of each row: 1 where all mass is on one token, 0 where it is spread evenly.

    Args:
        logits: [rows, V] float, V >= 2.

    Returns:
        [rows] float32.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(dim=-1)
    score = (1 - entropy / math.log(logits.shape[-1])).clamp(0, 1)
    return torch.where(torch.isfinite(log_p.amax(dim=-1)), score, torch.nan)


def saturation(states: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """(1 + cosine) / 2 of each exit state with the state one layer before.

    Hidden-state saturation of CALM (Schuster et al. 2022, section 3.4), put into [0, 1].

    Args:
        states, earlier: [rows, d] float.

    Returns:
        [rows] float32.
    """
    cosine = torch.cosine_similarity(states.float(), earlier.float(), dim=-1)
    return ((1 + cosine) / 2).clamp(0, 1)
