"""Bodies of requests: random words or token ids of a length, or prompts of a file."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

Prompt = str | list[int] | list[dict[str, str]]
"""A text, token ids, or the messages of a chat."""

# Common words, each a token of its own in most vocabularies when a space stands before it.
_TEXT = (
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city community name president team minute idea "
    "kid body information back parent face others level office door health person art war "
    "history party result change morning reason research girl guy moment air teacher force "
    "education good new first last long great little own other old right big high different "
    "small large next early young important few public bad same able"
)
_WORDS = _TEXT.split()


def random_prompts(
    count: int, length: int, *, seed: int | str, vocab_size: int | None = None
) -> list[Prompt]:
    """Prompts that share no prefix.

    Args:
        length: of each, in words; in tokens where ``vocab_size`` is given.
        vocab_size: draw token ids below this instead; only completions take them.
    """
    draw = random.Random(seed)
    if vocab_size is not None:
        return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
    return [" ".join(draw.choices(_WORDS, k=length)) for _ in range(count)]


def bodies_of(
    prompts: Sequence[Prompt],
    *,
    endpoint: str,
    model: str,
    output_len: int,
    ignore_eos: bool,
    extra: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Bodies of streamed, greedy requests.

    Args:
        prompts: one a request.
        extra: fields that are added, or stand in for ours.

    Raises:
        ValueError: for messages that go to completions, or token ids that go to chat.
    """
    chat = endpoint.endswith("/chat/completions")
    found = []
    for prompt in prompts:
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            body["ignore_eos"] = True
        is_messages = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
        if chat and not isinstance(prompt, str) and not is_messages:
            raise ValueError("chat takes no token ids: use the endpoint /v1/completions.")
        if not chat and is_messages:
            raise ValueError("completions take no messages: use the endpoint /v1/chat/completions.")
        if not chat:
            body["prompt"] = prompt
        elif isinstance(prompt, str):
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["messages"] = list(prompt)
        found.append(body | dict(extra))
    return found
