"""The official client against a real server: everything a user would write."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai as sdk
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.ray_fixtures import TestServer

QUESTION: Any = [{"role": "user", "content": "What is the capital of France? One sentence."}]
MODES = ["full", "exact", "rollback", "free", "copy"]


def extra(choice: Any, name: str) -> Any:
    return (choice.model_extra or {})[name]


def compute_of(answer: Any) -> dict[str, Any]:
    return dict(answer.usage.model_extra["compute"])


def ask(openai: OpenAI, server: TestServer, **fields: Any) -> ChatCompletion:
    fields = {"max_tokens": 24, "temperature": 0, "messages": QUESTION, **fields}
    answer = openai.chat.completions.create(model=server.model, **fields)
    assert isinstance(answer, ChatCompletion)
    return answer


def stream(openai: OpenAI, server: TestServer, **fields: Any) -> list[ChatCompletionChunk]:
    fields = {"max_tokens": 24, "temperature": 0, "messages": QUESTION, **fields}
    return list(openai.chat.completions.create(model=server.model, stream=True, **fields))


def test_models(openai: OpenAI, server: TestServer) -> None:
    assert [model.id for model in openai.models.list()] == [server.model]
    assert openai.models.retrieve(server.model).id == server.model
    with pytest.raises(sdk.NotFoundError):
        openai.models.retrieve("gpt-0")


def test_chat(openai: OpenAI, server: TestServer) -> None:
    answer = ask(openai, server)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.completion_tokens >= 5
    compute = compute_of(answer)
    assert compute["mode"] == "exact"
    assert compute["decided"] == answer.usage.completion_tokens
    assert compute["flops"] > 1e9


def test_chat_stream(openai: OpenAI, server: TestServer) -> None:
    chunks = stream(openai, server, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask(openai, server).choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert compute_of(chunks[-1])["mode"] == "exact"
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_tokens_arrive_as_they_are_made(openai: OpenAI, server: TestServer) -> None:
    start = time.perf_counter()
    fields: Any = {"max_tokens": 40, "temperature": 0, "messages": QUESTION}
    times = [
        time.perf_counter() - start
        for _ in openai.chat.completions.create(
            model=server.model, stream=True, extra_body={"ignore_eos": True}, **fields
        )
    ]
    assert len(times) > 5
    assert times[1] < 0.6 * times[-1]


def test_completions(openai: OpenAI, server: TestServer) -> None:
    fields: Any = {"model": server.model, "temperature": 0, "max_tokens": 8}
    prompts = ["The capital of France is", "Two plus two is"]
    both = openai.completions.create(prompt=prompts, **fields)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert "Paris" in both.choices[0].text
    one = openai.completions.create(prompt=prompts[1], **fields)
    assert one.choices[0].text == both.choices[1].text
    streamed = openai.completions.create(prompt=prompts[1], stream=True, **fields)
    assert "".join(c.choices[0].text for c in streamed) == one.choices[0].text
    echoed = openai.completions.create(prompt=prompts[1], echo=True, **fields)
    assert echoed.choices[0].text == prompts[1] + one.choices[0].text


def test_completions_of_token_ids(openai: OpenAI, server: TestServer) -> None:
    answer = openai.completions.create(
        model=server.model, prompt=[504, 3575, 282], max_tokens=4, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    default = openai.completions.create(
        model=server.model, prompt="Once", extra_body={"ignore_eos": True}
    )
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_logprobs(openai: OpenAI, server: TestServer) -> None:
    choice = ask(openai, server, logprobs=True, top_logprobs=3, max_tokens=5).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert "".join(entry.token for entry in entries) == choice.message.content
    for entry in entries:
        assert entry.logprob <= 0
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token
    old = openai.completions.create(
        model=server.model, prompt="The capital of France is", logprobs=2, max_tokens=3,
        temperature=0,
    ).choices[0]  # fmt: skip
    assert old.logprobs is not None
    assert "".join(old.logprobs.tokens or []) == old.text
    assert len(old.logprobs.top_logprobs or []) == 3


def test_stop(openai: OpenAI, server: TestServer) -> None:
    choice = ask(openai, server, stop=["Paris", "zebra"]).choices[0]
    assert choice.finish_reason == "stop"
    assert "Paris" not in (choice.message.content or "")
    assert extra(choice, "stop_reason") == "Paris"
    chunks = stream(openai, server, stop="Paris")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert ask(openai, server, max_tokens=3).choices[0].finish_reason == "length"


def test_n_and_seed(openai: OpenAI, server: TestServer) -> None:
    fields: Any = {"n": 2, "seed": 11, "temperature": 1.2, "max_tokens": 16}
    texts = [c.message.content for c in ask(openai, server, **fields).choices]
    assert len(texts) == 2
    assert texts[0] != texts[1]
    assert [c.message.content for c in ask(openai, server, **fields).choices] == texts
    streamed = ["", ""]
    for chunk in stream(openai, server, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    other = ask(openai, server, **{**fields, "seed": 12})
    assert [c.message.content for c in other.choices] != texts


def test_depths(openai: OpenAI, server: TestServer) -> None:
    body = {
        "depths": True,
        "ignore_eos": True,
        "compute": {"mode": "free", "policy": "forced", "forced_exit_rate": 0.5},
    }
    card: Any = openai.models.retrieve(server.model)
    answer = ask(openai, server, extra_body=body, seed=1)
    depths = extra(answer.choices[0], "depths")
    assert len(depths) == 24
    assert set(depths) == {card.exit_depth, card.num_layers}
    compute = compute_of(answer)
    assert compute["exited"] == sum(depth == card.exit_depth for depth in depths)
    assert compute["mean_depth"] == pytest.approx(sum(depths) / 24)
    assert compute["exit_rate"] == pytest.approx(compute["exited"] / 24)
    chunks = stream(openai, server, extra_body=body, seed=1)
    streamed = [d for c in chunks for d in (c.choices[0].model_extra or {}).get("depths", [])]
    assert streamed == depths


@pytest.mark.parametrize("mode", MODES)
def test_each_mode(openai: OpenAI, server: TestServer, mode: str) -> None:
    compute = {"mode": mode, "policy": "threshold", "exit_threshold": 0.5, "max_stack": 4}
    answer = ask(openai, server, extra_body={"compute": compute})
    figures = compute_of(answer)
    assert figures["mode"] == mode
    assert figures["layers_per_token"] > 0
    if mode == "full":
        assert figures["drafted"] == 0
        assert figures["mean_depth"] == 30
    assert answer.choices[0].message.content


@pytest.mark.parametrize(
    "policy",
    [
        {"policy": "threshold", "exit_threshold": 0.3},
        {"policy": "forced", "forced_exit_rate": 0.8, "max_stack": 4},
        {"policy": "always"},
    ],
    ids=lambda policy: str(policy["policy"]),
)
def test_exact_is_full(openai: OpenAI, server: TestServer, policy: dict[str, Any]) -> None:
    """Mode exact is lossless: the same tokens as the full model, whatever exits."""
    fields: Any = {
        "messages": [{"role": "user", "content": "Write a short story about a lighthouse."}],
        "max_tokens": 48,
    }
    full = ask(openai, server, extra_body={"compute": {"mode": "full"}}, **fields)
    exact = ask(openai, server, extra_body={"compute": {"mode": "exact", **policy}}, **fields)
    assert exact.choices[0].message.content == full.choices[0].message.content
    assert compute_of(exact)["drafted"] > 0


def test_prefix_cache_is_reported(openai: OpenAI, server: TestServer) -> None:
    long: Any = [{"role": "user", "content": "Tell me about " + "very " * 60 + "old stones."}]
    first = ask(openai, server, messages=long, max_tokens=2)
    again = ask(openai, server, messages=long, max_tokens=2)
    salted = ask(openai, server, messages=long, max_tokens=2, extra_body={"cache_salt": "x"})
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, again, salted)]  # type: ignore[union-attr]
    assert cached[1] is not None
    assert cached[1] >= 64
    assert cached[2] == 0


def test_sixteen_at_once_and_one_leaves(openai: OpenAI, server: TestServer) -> None:
    prompts = [f"The number {i} is" for i in range(16)]
    fields: Any = {"model": server.model, "max_tokens": 24, "temperature": 0}
    body = {"ignore_eos": True}

    def complete(prompt: str) -> str:
        answer = openai.completions.create(prompt=prompt, extra_body=body, **fields)
        return answer.choices[0].text

    def leave(prompt: str) -> int:
        chunks = openai.completions.create(
            prompt=prompt, stream=True, extra_body=body, **{**fields, "max_tokens": 2000}
        )
        seen = 0
        for _ in chunks:
            seen += 1
            if seen == 3:
                break
        chunks.close()
        return seen

    with ThreadPoolExecutor(17) as pool:
        leaver = pool.submit(leave, "A story without end:")
        together = list(pool.map(complete, prompts))
        assert leaver.result() == 3
    assert all(together)
    for i in (0, 7, 15):
        assert complete(prompts[i]) == together[i]
    server.wait_until_idle()


def test_errors_reach_the_client_as_its_own(openai: OpenAI, server: TestServer) -> None:
    with pytest.raises(sdk.BadRequestError) as bad:
        ask(openai, server, temperature=3)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(sdk.BadRequestError) as bad:
        ask(openai, server, extra_body={"compute": {"mode": "magic"}})
    assert bad.value.param == "compute.mode"
    with pytest.raises(sdk.NotFoundError) as missing:
        openai.chat.completions.create(model="gpt-0", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(sdk.BadRequestError) as long:
        ask(openai, server, messages=[{"role": "user", "content": "word " * 20_000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(sdk.AuthenticationError) as refused:
        openai.with_options(api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key"
