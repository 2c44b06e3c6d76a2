"""Where two modes part: is it a near-tie of the full model's logits?

In float32 ``exact`` equals ``full``. In bfloat16 the number of rows of a pass changes how its sums
are rounded, so two nearly equal logits can change places, and the texts go on differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fathom.bench.measure import Prompts
from fathom.types import AcceptMode, ComputePolicy, Request, SamplingParams

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

_ALTERNATIVES = 20


def explain_differences(
    engine: Engine, prompts: Prompts, ours: list[list[int]], full: list[list[int]]
) -> list[dict[str, Any]]:
    """The first difference of each answer that differs.

    Returns:
        for each: ``request``, ``position`` of the token in the answer, and ``gap_nats``, by how
        much the full model prefers its own token to ours after the same text (None where ours is
        not among its best alternatives).
    """
    found = []
    for request, (a, b) in enumerate(zip(ours, full, strict=True)):
        if a == b:
            continue
        position = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        text = (*prompts[request % len(prompts)], *b[:position])
        logprobs = _next_token_logprobs(engine, text)
        pair = [logprobs.get(token[position]) for token in (b, a)]
        gap = None if pair[0] is None or pair[1] is None else pair[0] - pair[1]
        found.append({"request": request, "position": position, "gap_nats": gap})
    return found


def _next_token_logprobs(engine: Engine, text: tuple[int, ...]) -> dict[int, float]:
    engine.add_request(
        Request(
            request_id="difference",
            prompt_token_ids=text,
            sampling=SamplingParams(max_tokens=1, logprobs=_ALTERNATIVES, ignore_eos=True),
            compute=ComputePolicy(mode=AcceptMode.FULL),
        )
    )
    best: dict[int, float] = {}
    while engine.has_work():
        for output in engine.step():
            for token in output.tokens:
                best = dict(token.top_logprobs or {})
    return best
