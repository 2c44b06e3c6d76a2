"""Requests through the engine: answers with their cost, and log-likelihoods of given tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fathom.evaluation.encode import Ids, Scored
from fathom.evaluation.errors import EvaluationError
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    ComputeUsage,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
)

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

Advance = Callable[[], None]
"""Called as each request ends."""


@dataclass(slots=True)
class Answer:
    """What a request gave. compute: its page of the ledger."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    compute: ComputeUsage = field(default_factory=ComputeUsage)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Answer:
        """From ``to_json``."""
        return cls(value["token_ids"], value["text"], ComputeUsage(**value["compute"]))


def requests_for(
    prompts: Sequence[Ids], compute: ComputePolicy, new_tokens: int, first_seed: int = 0
) -> list[Request]:
    """Greedy requests. Draws of forced exits follow from the seed: equal ones in every run."""
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=ids,
            sampling=SamplingParams(max_tokens=new_tokens, seed=first_seed + index),
            compute=compute,
        )
        for index, ids in enumerate(prompts)
    ]


def generate(
    engine: Engine, requests: Sequence[Request], advance: Advance
) -> tuple[list[Answer], float]:
    """Answer all requests at once; ids are their places as text.

    Returns:
        the answers in order, and the seconds that they took together, prefill included.

    Raises:
        EvaluationError: when one fails in the engine.
    """
    answers = [Answer() for _ in requests]

    def take(index: int, output: RequestOutput) -> None:
        answers[index].token_ids += [token.id for token in output.tokens]
        answers[index].text += output.text
        if output.usage is not None:
            answers[index].compute = output.usage.compute

    start = time.perf_counter()
    _run(engine, requests, take, advance)
    return answers, time.perf_counter() - start


def log_likelihoods(
    engine: Engine, texts: Sequence[Scored], advance: Advance
) -> list[tuple[float, int]]:
    """Log-likelihood of each text's scored tokens under the full-depth model.

    Returns:
        of each text, the sum in nats and the number of tokens.

    Raises:
        EvaluationError: when one fails in the engine.
    """
    found: list[tuple[float, int]] = [(0.0, 0)] * len(texts)
    params = SamplingParams(prompt_logprobs=0, max_tokens=0)
    full = ComputePolicy(mode=AcceptMode.FULL)
    requests = [
        Request(request_id=str(i), prompt_token_ids=text.ids, sampling=params, compute=full)
        for i, text in enumerate(texts)
    ]

    def take(index: int, output: RequestOutput) -> None:
        if output.prompt_tokens is None:
            return
        scored = output.prompt_tokens[texts[index].first :]
        logprobs = [token.logprob for token in scored if token.logprob is not None]
        found[index] = (sum(logprobs), len(logprobs))

    _run(engine, requests, take, advance)
    for text, (_, count) in zip(texts, found, strict=True):
        if count != len(text.ids) - text.first:
            raise EvaluationError("the engine left tokens without a log-probability.")
    return found


def _run(
    engine: Engine,
    requests: Sequence[Request],
    take: Callable[[int, RequestOutput], None],
    advance: Advance,
) -> None:
    for request in requests:
        engine.add_request(request)
    while engine.has_work():
        for output in engine.step():
            if output.finish_reason is FinishReason.ERROR:
                raise EvaluationError(f"a request failed: {output.error}")
            take(int(output.request_id), output)
            if output.finish_reason is not None:
                advance()
