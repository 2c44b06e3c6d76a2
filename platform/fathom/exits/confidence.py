"""Confidence of the shallow stage in its draft: scores in [0, 1], larger is surer.

Every measure gives NaN for a row that it cannot judge (a NaN or infinity in it), and no policy
takes NaN for confidence. ``temperature`` divides the logits first (Guo et al. 2017, equation 9);
it moves the confidence, never the best column.
"""

from __future__ import annotations

import math

import torch


def softmax_gap(
    logits: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Difference of the two largest probabilities, FREE's default confidence (free.md).

    Args:
        logits: [rows, vocabulary] float; at least two columns. -inf bars a column.

    Returns:
        the gap, [rows] float32 in [0, 1], NaN where a row has a NaN or no finite total; and the
        index of the best column, [rows] int64.
    """
    logits = _scaled(logits, temperature)
    total = torch.logsumexp(logits, dim=-1)
    # Two max reductions beat topk(2) on a 49,152-token vocabulary on CPU.
    best, index = logits.max(dim=-1)
    second = logits.scatter(-1, index[:, None], float("-inf")).amax(dim=-1)
    gap = (best - total).exp() - (second - total).exp()
    return torch.where(torch.isfinite(total), gap, torch.nan), index


def max_prob(logits: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest probability; arguments and results as of ``softmax_gap``."""
    logits = _scaled(logits, temperature)
    total = torch.logsumexp(logits, dim=-1)
    best, index = logits.max(dim=-1)
    return torch.where(torch.isfinite(total), (best - total).exp(), torch.nan), index


def certainty(logits: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - H / log(columns), H the entropy: 1 for one sure token, 0 for the uniform distribution.

    Arguments and results as of ``softmax_gap``.
    """
    logits = _scaled(logits, temperature)
    total = torch.logsumexp(logits, dim=-1)
    log_p = logits - total[:, None]
    p = log_p.exp()
    # A barred column has p = 0 and adds nothing: 0 * log 0 = 0.
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(dim=-1)
    score = (1 - entropy / math.log(logits.shape[-1])).clamp(0, 1)
    return torch.where(torch.isfinite(total), score, torch.nan), logits.argmax(dim=-1)


def saturation(states: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """(1 + cosine) / 2 of the exit state with the state one layer before (CALM's third measure).

    Schuster et al. 2022, section 3.2, take the cosine itself; here it is moved to [0, 1].

    Args:
        states, earlier: [rows, d] float.

    Returns:
        [rows] float32 in [0, 1]; NaN for rows that are not finite. A row of zeros counts as
        orthogonal to everything: 0.5.
    """
    cosine = torch.cosine_similarity(states.float(), earlier.float(), dim=-1)
    return ((1 + cosine) / 2).clamp(0, 1)


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def entropy(logits: torch.Tensor) -> float:
    """Entropy of one row's distribution, in nats.

    Args:
        logits: [vocabulary] float.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    return float(-(log_p.exp() * log_p).nan_to_num().sum())
