"""Answers of the whole application over a real tiny engine in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient

from fathom.models.tokenizer import Tokenizer

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 6,
    "temperature": 0,
    "ignore_eos": True,
}
TEXT: dict[str, Any] = {
    "model": "tiny",
    "prompt": "hi",
    "max_tokens": 6,
    "temperature": 0,
    "ignore_eos": True,
}


def post(client: TestClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_chat(client: TestClient) -> None:
    body = post(client, "/v1/chat/completions", {**CHAT, "depths": True})
    ChatCompletion.model_validate(body, strict=True)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["system_fingerprint"].startswith("fathom-")
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert len(choice["depths"]) == 6
    assert set(choice["depths"]) <= {2, 4}
    usage = body["usage"]
    assert usage["prompt_tokens"] == len("<|user|>hi\n<|assistant|>")
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert "cached_tokens" in usage["prompt_tokens_details"]
    assert usage["compute"]["mode"] == "exact"
    assert usage["compute"]["decided"] == 6
    assert usage["compute"]["flops"] > 0


def test_stream_says_what_the_whole_says(client: TestClient) -> None:
    asked = {**CHAT, "logprobs": True, "top_logprobs": 2, "depths": True, "max_tokens": 12}
    whole = post(client, "/v1/chat/completions", asked)
    chunks = events(
        client, "/v1/chat/completions", {**asked, "stream_options": {"include_usage": True}}
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    *news, last = chunks
    assert news[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["usage"] is None for chunk in news)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["compute"]["decided"] == 12
    choices = [chunk["choices"][0] for chunk in news]
    expected = whole["choices"][0]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == expected["message"]["content"]
    assert [d for choice in choices for d in choice.get("depths", [])] == expected["depths"]
    scored = [s for choice in choices if choice["logprobs"] for s in choice["logprobs"]["content"]]
    assert [s["token"] for s in scored] == [s["token"] for s in expected["logprobs"]["content"]]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_a_stream_has_no_usage_unless_asked(client: TestClient) -> None:
    chunks = events(client, "/v1/chat/completions", CHAT)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_logprobs_of_chat(client: TestClient) -> None:
    body = post(client, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3})
    scored = body["choices"][0]["logprobs"]["content"]
    assert len(scored) == 6
    for entry in scored:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        # Greedy: the chosen token is the best one.
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
    body = post(client, "/v1/chat/completions", {**CHAT, "logprobs": True})
    assert all(entry["top_logprobs"] == [] for entry in body["choices"][0]["logprobs"]["content"])


def test_logprobs_of_completions(client: TestClient) -> None:
    body = post(client, "/v1/completions", {**TEXT, "logprobs": 2})
    Completion.model_validate(body, strict=True)
    logprobs = body["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {6}
    assert logprobs["text_offset"][0] == 0
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == pytest.approx(logprob)
        assert max(top.values()) == pytest.approx(logprob)


def test_choices_of_several_prompts_and_n(client: TestClient) -> None:
    asked = {**TEXT, "prompt": ["hi", "ho", "he"], "n": 2, "seed": 5, "temperature": 1.0}
    body = post(client, "/v1/completions", asked)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 36
    texts = [choice["text"] for choice in body["choices"]]
    alone = post(client, "/v1/completions", {**asked, "prompt": "ho"})
    assert [choice["text"] for choice in alone["choices"]] == texts[2:4]
    chunks = events(client, "/v1/completions", asked)
    streamed = [""] * 6
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


@pytest.mark.parametrize("prompt", ["hi", [104, 105], [[104, 105], [104]], ["hi", "é"]])
def test_echo(client: TestClient, prompt: Any) -> None:
    plain = post(client, "/v1/completions", {**TEXT, "prompt": prompt})
    echoed = post(client, "/v1/completions", {**TEXT, "prompt": prompt, "echo": True})
    for a, b in zip(plain["choices"], echoed["choices"], strict=True):
        assert b["text"].endswith(a["text"])
        assert len(b["text"]) > len(a["text"])
    if prompt == "hi":
        assert echoed["choices"][0]["text"] == "hi" + plain["choices"][0]["text"]
        chunks = events(client, "/v1/completions", {**TEXT, "echo": True})
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == echoed["choices"][0]["text"]


def streamed(client: TestClient, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, joined: what ``choices`` of the whole answer holds, by index."""
    joined: dict[int, dict[str, Any]] = {}
    for chunk in events(client, "/v1/completions", body):
        for choice in chunk["choices"]:
            whole = joined.setdefault(choice["index"], {"text": "", "logprobs": {}})
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                whole["logprobs"].setdefault(name, []).extend(values)
    return joined


# In mode free, tokens are final before the deep stage has seen the prompt.
@pytest.mark.parametrize(
    "compute", [{"mode": "exact"}, {"mode": "free", "policy": "always"}], ids=["exact", "free"]
)
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_echo_with_logprobs(client: TestClient, compute: dict[str, Any], max_tokens: int) -> None:
    prompts = ["hi, you", "ho"]
    asked = {
        **TEXT,
        "prompt": prompts,
        "n": 2,
        "seed": 1234,
        "logprobs": 1,
        "echo": True,
        "max_tokens": max_tokens,
        "compute": compute,
    }
    body = post(client, "/v1/completions", asked)
    choices = body["choices"]
    assert body["usage"]["completion_tokens"] == 4 * max_tokens
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice in choices:
        prompt = prompts[choice["index"] // 2]
        assert choice["text"].startswith(prompt)
        assert choice["finish_reason"] == "length"
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(prompt) + max_tokens}
        assert logprobs["tokens"][: len(prompt)] == list(prompt)
        assert logprobs["text_offset"][: len(prompt) + 1] == list(
            range(len(prompt) + bool(max_tokens))
        )
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        for token, logprob, top in zip(*list(logprobs.values())[:3], strict=True):
            if logprob is not None:
                assert top[token] == pytest.approx(logprob) and logprob <= max(top.values())
    for a, b in zip(choices[::2], choices[1::2], strict=True):  # greedy: the same n times
        assert a["text"] == b["text"]
        size = len(prompts[a["index"] // 2])
        for name, values in a["logprobs"].items():
            assert values[:size] == b["logprobs"][name][:size]
    chunks = streamed(client, asked)
    for choice in choices:
        chunk = chunks[choice["index"]]
        assert chunk["text"] == choice["text"]
        assert chunk["finish_reason"] == "length"
        for name, values in choice["logprobs"].items():
            if name != "text_offset":  # a partial character may be held back in one and not both
                assert chunk["logprobs"][name] == values


def test_echo_alone_may_ask_for_no_tokens(client: TestClient) -> None:
    asked = {**TEXT, "echo": True, "max_tokens": 0}
    (choice,) = post(client, "/v1/completions", asked)["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("hi", None, "length")
    joined = streamed(client, asked)[0]
    assert (joined["text"], joined["logprobs"], joined["finish_reason"]) == ("hi", {}, "length")


def test_offsets_of_a_prompt_count_characters(client: TestClient, tokenizer: Tokenizer) -> None:
    asked = {**TEXT, "prompt": "aé!", "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = post(client, "/v1/completions", asked)["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2]  # é is two tokens here
    asked["prompt"] = [256, *tokenizer.encode("ab")]
    (choice,) = post(client, "/v1/completions", asked)["choices"]
    assert choice["text"] == "ab"  # without the end token
    assert choice["logprobs"]["tokens"] == ["<|end|>", "a", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]


def test_seed_reproduces(client: TestClient) -> None:
    asked = {**TEXT, "temperature": 1.0, "max_tokens": 20}
    first, again, other = (
        post(client, "/v1/completions", {**asked, "seed": seed})["choices"][0]["text"]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_modes_full_and_exact_agree(client: TestClient) -> None:
    texts = {}
    for mode in ("full", "exact"):
        compute = {"mode": mode, "policy": "forced", "forced_exit_rate": 0.7}
        body = post(client, "/v1/completions", {**TEXT, "max_tokens": 60, "compute": compute})
        texts[mode] = body["choices"][0]["text"]
        assert body["usage"]["compute"]["mode"] == mode
    assert texts["full"] == texts["exact"]


def test_stop_string(client: TestClient) -> None:
    asked = {**TEXT, "max_tokens": 20, "logit_bias": {"65": 100}}  # one letter, again and again
    text = post(client, "/v1/completions", asked)["choices"][0]["text"]
    stop = text[:1] * 3
    assert text.startswith(stop)
    choice = post(client, "/v1/completions", {**asked, "stop": ["?", stop]})["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    assert choice["text"] == ""
    chunks = events(client, "/v1/completions", {**asked, "stop": stop})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ""


def test_models(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny"
    assert card["max_model_len"] == 128
    assert (card["num_layers"], card["exit_layer"]) == (4, 2)
    assert client.get("/v1/models/tiny").json() == card


def test_operator_routes(client: TestClient) -> None:
    assert client.get("/ready").json() == {"status": "ready", "replicas": 1}
    assert client.get("/version").json()["version"]
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
    text = client.get("/metrics").text
    assert 'fathom_num_requests_running{model_name="tiny",replica="local"} 0.0' in text
