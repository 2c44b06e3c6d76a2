from __future__ import annotations

from typing import Any

import pytest

from fathom.api.backend import ModelInfo
from fathom.api.convert import Defaults, chat_request, completion_requests
from fathom.api.schemas import ChatCompletionRequest, CompletionRequest
from fathom.models.tokenizer import Tokenizer
from fathom.types import AcceptMode, ComputePolicy, Request

INFO = ModelInfo(num_layers=4, exit_layer=2, vocab_size=257, max_model_len=128)
DEFAULTS = Defaults(compute=ComputePolicy(), timeout_s=9.0)


def chat(tokenizer: Tokenizer, **fields: Any) -> Request:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
    return chat_request(ChatCompletionRequest.model_validate(body), "id", tokenizer, INFO, DEFAULTS)


def text(tokenizer: Tokenizer, **fields: Any) -> list[Request]:
    body = CompletionRequest.model_validate({"model": "tiny", "prompt": "hi", **fields})
    return completion_requests(body, "id", tokenizer, INFO, DEFAULTS)


def test_chat_defaults(tokenizer: Tokenizer) -> None:
    request = chat(tokenizer)
    assert tokenizer.decode(request.prompt_token_ids) == "<|user|>hi\n<|assistant|>"
    assert request.sampling.temperature == 1.0
    assert request.sampling.max_tokens == 128 - len(request.prompt_token_ids)
    assert request.sampling.logprobs is None
    assert request.n == 1
    assert request.timeout_s == 9.0
    assert request.compute == ComputePolicy()


def test_null_stands_for_the_default(tokenizer: Tokenizer) -> None:
    names = ["temperature", "n", "stop", "seed", "max_tokens", "logit_bias", "compute", "tools"]
    assert chat(tokenizer, **dict.fromkeys(names)) == chat(tokenizer)


def test_unknown_fields_are_ignored(tokenizer: Tokenizer) -> None:
    assert chat(tokenizer, service_tier="auto", no_such_field={"a": 1}) == chat(tokenizer)


def test_every_sampling_field_arrives(tokenizer: Tokenizer) -> None:
    params = chat(
        tokenizer,
        max_completion_tokens=7, max_tokens=9, temperature=0, top_p=0.5, top_k=5, min_p=0.1,
        seed=-3, stop=["x", "yz"], stop_token_ids=[3], ignore_eos=True, min_tokens=2,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5,
        logit_bias={"7": -100}, logprobs=True, top_logprobs=4,
    ).sampling  # fmt: skip
    assert params.max_tokens == 7
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 5, 0.1)
    assert (params.seed, params.stop, params.stop_token_ids) == (-3, ("x", "yz"), (3,))
    assert (params.ignore_eos, params.min_tokens, params.logprobs) == (True, 2, 4)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.repetition_penalty == 1.5
    assert params.logit_bias == {7: -100}
    assert chat(tokenizer, top_k=-1).sampling.top_k == 0
    assert chat(tokenizer, logprobs=True).sampling.logprobs == 0
    assert chat(tokenizer, stop="x").sampling.stop == ("x",)
    assert chat(tokenizer, cache_salt="s", n=3).cache_salt == "s"
    assert chat(tokenizer, n=3).n == 3


def test_messages_in_parts_and_developer_role(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    prompt = chat(tokenizer, messages=messages).prompt_token_ids
    assert tokenizer.decode(prompt) == "<|system|>be\n<|user|>ab\n<|assistant|>"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["hi", "ho"], ["hi", "ho"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_forms_of_prompts(tokenizer: Tokenizer, prompt: Any, expected: list[Any]) -> None:
    requests = text(tokenizer, prompt=prompt)
    assert len({request.request_id for request in requests}) == len(expected)
    for request, want in zip(requests, expected, strict=True):
        ids = tuple(tokenizer.encode(want)) if isinstance(want, str) else want
        assert request.prompt_token_ids == ids


def test_completion_defaults(tokenizer: Tokenizer) -> None:
    assert text(tokenizer)[0].sampling.max_tokens == 16
    assert text(tokenizer, prompt="a" * 120)[0].sampling.max_tokens == 8
    assert text(tokenizer, logprobs=0)[0].sampling.logprobs == 0
    assert text(tokenizer, best_of=1)[0].n == 1


def test_compute_and_effort_arrive(tokenizer: Tokenizer) -> None:
    assert chat(tokenizer, reasoning_effort="low").compute.mode is AcceptMode.FREE
    both = {"reasoning_effort": "low", "compute": {"exit_threshold": 0.3}}
    for request in (chat(tokenizer, **both), text(tokenizer, **both)[0]):
        assert (request.compute.mode, request.compute.exit_threshold) == (AcceptMode.FREE, 0.3)
