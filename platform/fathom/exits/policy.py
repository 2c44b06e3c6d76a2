"""Exit policies: does a drafted token leave at the exit layer, or wait for the deep stage?"""

from __future__ import annotations

import math

from fathom.types import AcceptMode, ComputePolicy, PolicyName


def exits(
    compute: ComputePolicy, confidence: float, *, threshold: float | None = None, uniform: float = 0
) -> bool:
    """Decide for one token.

    Args:
        compute: the request's compute policy.
        threshold: λ of this moment, where a policy follows what was seen (``exits.live``); None
            takes the request's own.
        confidence: the shallow stage's confidence in its draft. A non-finite confidence never
            exits, whatever the policy (EE-LLM's issue 11 is what happens otherwise).
        uniform: a draw from [0, 1) that belongs to this token; only ``forced`` looks at it.
    """
    if compute.mode is AcceptMode.FULL or not math.isfinite(confidence):
        return False
    match compute.policy:
        case PolicyName.NEVER:
            return False
        case PolicyName.ALWAYS:
            return True
        case PolicyName.FORCED:
            return uniform < compute.forced_exit_rate
        case PolicyName.THRESHOLD | PolicyName.ADAPTIVE | PolicyName.BUDGET | PolicyName.RISK:
            return confidence > (compute.threshold if threshold is None else threshold)
