"""The requests of a drill: greedy, of every mode, some behind one long prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fathom.bench.prompts import QUESTIONS
from fathom.types import AcceptMode

MODES = (AcceptMode.FULL, AcceptMode.EXACT, AcceptMode.ROLLBACK, AcceptMode.FREE)

# Some two hundred tokens: several KV blocks that replicas find in the shared store.
_PREFIX = (
    "You are the assistant of a public library. Answer in plain words, in at most four sentences, "
    "and say so when you do not know. The library opens at nine on weekdays and at ten on "
    "Saturdays, and is closed on Sundays and public holidays. Books are lent for four weeks, "
    "films and games for one week, and newspapers are read in the house. A loan can be prolonged "
    "twice unless somebody else waits for the item. The reading room on the second floor is "
    "silent; groups meet in the rooms behind the cafe, which are booked at the front desk or on "
    "the website, for two hours at most. Children under twelve need the signature of a parent "
    "for a card of their own. Printing costs ten cents a page, scanning is free, and the "
    "computers by the windows may be used for an hour at a time. Lost items are paid for at "
    "their price when bought, late ones at twenty cents a day, up to five euros an item."
)


def distinct_requests(model: str, modes: Sequence[AcceptMode], new_tokens: int) -> list[Any]:
    """Bodies of chat completions that differ in mode and prompt, modes first.

    Every second prompt stands behind the long prefix. The first two of every four ask for
    logprobs, which show each token; the others go the cheaper way without logits. All ask for
    depths, which count tokens. One prompt in six asks for two completions.

    Args:
        new_tokens: most of an answer.
    """
    bodies = []
    for place, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        if place % 2:
            messages.insert(0, {"role": "system", "content": _PREFIX})
        for mode in modes:
            body: dict[str, Any] = {
                "model": model,
                "messages": messages,
                "max_tokens": new_tokens,
                "temperature": 0,
                "stream": True,
                "depths": True,
                "compute": {"mode": mode.value},
            }
            if place // 2 % 2 == 0:
                body["logprobs"] = True
            if place % 6 == 3:
                body["n"] = 2
            bodies.append(body)
    return bodies


def pick(bodies: Sequence[Any], requests: int) -> list[Any]:
    """As many of the distinct requests as a drill of ``requests`` repeats often enough.

    Each costs a request of the undisturbed run.
    """
    return list(bodies[: max(4, requests // 8)])
