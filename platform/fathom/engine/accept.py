"""Accept modes: what a flush makes of the decisions that it verified (free.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fathom.engine import sampling
from fathom.engine.random import Draw, uniform
from fathom.engine.sequence import Decision
from fathom.types import AcceptMode, ComputePolicy, SamplingParams


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the deep stage says of one decision.

    Attributes:
        token: the token that stands at ``decision.position + 1`` now.
        kept: whether that is the draft.
        agreed: for drafts, whether the deep stage would have accepted it, whatever the mode then
            did: the mode's own rule, and equality of the greedy choices in ``free``.
        deep_argmax: the deep stage's greedy choice: beside the confidence it is what exit
            policies learn from.
    """

    token: int
    kept: bool
    agreed: bool
    deep_argmax: int


def judge(
    decision: Decision,
    logits: torch.Tensor | None,
    argmax: int,
    *,
    draft_logprob: float = math.nan,
    compute: ComputePolicy,
    params: SamplingParams,
    seed: int,
    epoch: int,
) -> Verdict:
    """Judge one decision by the deep stage's logits of its row.

    - No draft: the deep stage's token stands.
    - ``free``: the draft stands (FREE, Bae et al. 2023).
    - ``rollback``: it stands iff -log p_deep(draft) <= rollback_nats (the paper's code); p_deep is
      taken at temperature 1. The replacement is the deep argmax, or at temperature > 0 a draw
      from the deep distribution (our choice: the source is greedy only).
    - ``exact``: greedy, it stands iff it is the deep argmax; at temperature > 0 by speculative
      rejection sampling (Leviathan et al. 2023, theorem 3.5): accept with probability
      min(1, p(x) / q(x)), else draw from max(0, p - q) normalised.

    Args:
        logits: [vocabulary], adjusted (``sampling.adjust``), finite; None where the request is
            greedy and plain, so that ``argmax`` (its best token) and ``draft_logprob`` say all.
        draft_logprob: of the draft, where the deep stage was asked for it; else NaN.
        seed, epoch: of the sequence, for its draws.
    """

    def draw_uniform(purpose: Draw) -> float:
        return uniform(seed, decision.position, epoch, purpose)

    def deep_token() -> int:
        if sampling.is_greedy(params):
            return argmax
        assert logits is not None
        probs = sampling.distribution(logits, params)
        return sampling.draw(probs, draw_uniform(Draw.DEEP))

    draft = decision.token
    if draft is None:
        return Verdict(deep_token(), kept=False, agreed=False, deep_argmax=argmax)

    match compute.mode:
        case AcceptMode.FREE:
            return Verdict(draft, kept=True, agreed=draft == argmax, deep_argmax=argmax)
        case AcceptMode.ROLLBACK:
            surprise = -draft_logprob
            if logits is not None:
                surprise = -float(torch.log_softmax(logits.float(), dim=-1)[draft])
            kept = surprise <= compute.rollback_nats
            return Verdict(
                draft if kept else deep_token(), kept=kept, agreed=kept, deep_argmax=argmax
            )
        case AcceptMode.EXACT if sampling.is_greedy(params):
            return Verdict(argmax, kept=draft == argmax, agreed=draft == argmax, deep_argmax=argmax)
        case AcceptMode.EXACT:
            assert decision.draft_probs is not None
            assert logits is not None
            deep_probs = sampling.distribution(logits, params)
            ratio = float(deep_probs[draft] / decision.draft_probs[draft])
            if draw_uniform(Draw.ACCEPT) < ratio:
                return Verdict(draft, kept=True, agreed=True, deep_argmax=argmax)
            residual = (deep_probs - decision.draft_probs).clamp_(min=0)
            if float(residual.sum()) <= 0:  # p = q up to rounding
                residual = deep_probs
            token = sampling.draw(residual, draw_uniform(Draw.RESAMPLE))
            return Verdict(token, kept=False, agreed=False, deep_argmax=argmax)
        case AcceptMode.FULL | AcceptMode.COPY:
            raise AssertionError(f"mode {compute.mode} has no drafts to judge")
