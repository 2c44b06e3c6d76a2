"""How many tokens could leave early, if a share of them must be right."""

from __future__ import annotations

import torch


def coverage_at_precision(
    confidence: torch.Tensor, agrees: torch.Tensor, precision: float = 0.95
) -> tuple[float, float]:
    """The most rows that one threshold can let go with at least this precision.

    Args:
        confidence: [n] float32 in [0, 1]. agrees: [n] bool, draft = the full path's choice.

    Returns:
        share of rows above the threshold, and the threshold; (0, 1) where there is none.
    """
    if not len(confidence):
        return 0.0, 1.0
    order = confidence.argsort(descending=True)
    confidence, agrees = confidence[order], agrees[order]
    count = torch.arange(1, len(order) + 1)
    good = agrees.cumsum(0) >= precision * count
    # A threshold takes all rows of equal confidence or none.
    last_of_its_kind = torch.ones_like(good)
    last_of_its_kind[:-1] = confidence[:-1] > confidence[1:]
    places = (good & last_of_its_kind).nonzero().flatten()
    if not len(places):
        return 0.0, 1.0
    place = int(places[-1])
    threshold = confidence[place + 1].item() if place + 1 < len(order) else 0.0
    return (place + 1) / len(order), threshold
