"""From logits to a token: penalties, bias, filters, temperature, logprobs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fathom.types import SamplingParams


def is_plain(params: SamplingParams) -> bool:
    """Whether logits are used as they are: no penalty, bias or masked stop token."""
    return (
        params.presence_penalty == 0
        and params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and not params.logit_bias
        and params.min_tokens == 0
    )


def is_greedy(params: SamplingParams) -> bool:
    """Whether the best token is always taken."""
    return params.temperature == 0


def adjust(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Sequence[int],
) -> torch.Tensor:
    """Apply penalties, bias and ``min_tokens``.

    Args:
        logits: [vocabulary]; left as it is.
        prompt, output: the tokens before the one to choose.
        stop_ids: token ids that would end generation.

    Returns:
        [vocabulary] float32.
    """
    if is_plain(params):
        return logits.float()
    logits = logits.to(torch.float32, copy=True)
    size = logits.shape[-1]
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *output}), dtype=torch.int64, device=logits.device)
        scores = logits[seen]
        # Keskar et al. 2019, as in transformers: divide positive scores, multiply negative ones.
        penalty = params.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(output, dtype=torch.int64, device=logits.device)
        counts = torch.bincount(ids, minlength=size)[:size].to(logits.dtype)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(output) < params.min_tokens:
        logits[list(stop_ids)] = float("-inf")
    return logits


def distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities that a token is drawn from at temperature > 0.

    Order of the filters as in vLLM: temperature, min-p, then top-k, then top-p.

    Args:
        logits: [vocabulary] float32, adjusted.

    Returns:
        [vocabulary] float64 that sums to 1.
    """
    logits = logits.double() / params.temperature
    if params.min_p > 0:
        probs = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probs < params.min_p * probs.max(), float("-inf"))
    if 0 < params.top_k < logits.shape[-1]:
        floor = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    probs = torch.softmax(logits, dim=-1)
    if params.top_p < 1:
        ranked, order = probs.sort(descending=True)
        # A token stays if the mass before it is below top_p; the first always does.
        keep = ranked.cumsum(dim=-1) - ranked < params.top_p
        probs = torch.zeros_like(probs).scatter(0, order, ranked * keep)
        probs /= probs.sum()
    return probs


def draw(probs: torch.Tensor, uniform: float) -> int:
    """Invert the cumulative distribution at ``uniform`` in [0, 1).

    Args:
        probs: [vocabulary] float64, non-negative, not all zero; need not sum to 1.
    """
    cumulative = probs.cumsum(dim=-1)
    target = uniform * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target, right=True))
    # Rounding may put the target on the last step, past the last token that has any mass.
    last = int(torch.nonzero(probs)[-1])
    return min(index, last)


def logprobs_of(
    logits: torch.Tensor, token: int, num_top: int
) -> tuple[float, dict[int, float] | None]:
    """Log probability of a token and of the best alternatives.

    Args:
        logits: [vocabulary] as the model gave them.

    Returns:
        the token's logprob in nats, and token id -> logprob of the ``num_top`` best, best first
        (None for 0).
    """
    scores = torch.log_softmax(logits.float(), dim=-1)
    top = None
    if num_top:
        values, ids = scores.topk(min(num_top, len(scores)))
        top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return float(scores[token]), top
