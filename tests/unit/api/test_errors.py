"""Every refusal, through the real application, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.convert import Defaults
from fathom.api.errors import as_api_error, failure_of
from fathom.api.local import LocalBackend
from fathom.api.service import Service
from fathom.config import EngineConfig
from fathom.engine.async_engine import AsyncEngine
from fathom.models.tokenizer import Tokenizer
from fathom.types import ComputePolicy, FinishReason, RequestOutput

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


def check(answer: Any, status: int, param: str | None, code: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["code"] == code
    if param is not None:
        assert param in error["message"] or code is not None
    return str(error["message"])


CHAT_REFUSALS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [257]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"compute": {"mode": "magic"}}, "compute.mode"),
    ({"compute": {"policy": "magic"}}, "compute.policy"),
    ({"compute": {"exit_threshold": 2}}, "compute.exit_threshold"),
    ({"compute": {"forced_exit_rate": -1}}, "compute.forced_exit_rate"),
    ({"compute": {"max_stack": 65}}, "compute.max_stack"),
    ({"compute": {"rollback_nats": -1}}, "compute.rollback_nats"),
    ({"compute": {"max_stack": "8"}}, "compute.max_stack"),
    ({"compute": {"depth": 3}}, "compute.depth"),
    ({"compute": "exact"}, "compute"),
]


@pytest.mark.parametrize(("change", "param"), CHAT_REFUSALS, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_chat_refusals_name_the_field(
    client: TestClient, change: dict[str, Any], param: str, stream: bool
) -> None:
    body = {**CHAT, **change}
    if stream and "stream_options" not in change:
        body["stream"] = True
    check(client.post("/v1/chat/completions", json=body), 400, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [1, 257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_completion_refusals_name_the_field(
    client: TestClient, change: dict[str, Any], param: str
) -> None:
    check(client.post("/v1/completions", json={**TEXT, **change}), 400, param)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
def test_numbers_that_are_not_finite(client: TestClient, field: str, literal: str) -> None:
    text = json.dumps(CHAT)[:-1] + f', "{field}": {literal}}}'
    check(client.post("/v1/chat/completions", content=text, headers=JSON), 400, field)


def test_missing_fields(client: TestClient) -> None:
    check(client.post("/v1/chat/completions", json={"model": "tiny"}), 400, "messages")
    check(client.post("/v1/completions", json={"prompt": "a"}), 400, "model")


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[]", b'"text"', b"null", b"\xff\xfe", b"[" * 5000], ids=repr
)
def test_bodies_that_are_no_json_object(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/chat/completions", content=content, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfffb"])
def test_half_characters_are_refused(client: TestClient, text: str) -> None:
    content = f'{{"model": "tiny", "prompt": "{text}"}}'
    check(client.post("/v1/completions", content=content, headers=JSON), 400, "prompt")
    content = f'{{"model": "{text}", "prompt": "a"}}'
    check(client.post("/v1/completions", content=content, headers=JSON), 400, "model")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_refused(client: TestClient, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post("/v1/completions", content=json.dumps(TEXT), headers=headers)
    assert "Content-Type: application/json" in check(answer, 400, None, "invalid_json")


def test_wrong_model(client: TestClient) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        answer = client.post(path, json={**body, "model": "gpt-0"})
        message = check(answer, 404, "model", "model_not_found")
        assert "gpt-0" in message
    check(client.get("/v1/models/gpt-0"), 404, "model", "model_not_found")


def test_too_long_a_prompt(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={**TEXT, "prompt": "a" * 128})
    message = check(answer, 400, "prompt", "context_length_exceeded")
    assert "128" in message
    body = {**CHAT, "messages": [{"role": "user", "content": "a" * 200}]}
    check(
        client.post("/v1/chat/completions", json=body), 400, "messages", "context_length_exceeded"
    )
    answer = client.post("/v1/completions", json={**TEXT, "max_tokens": 127})
    check(answer, 400, "max_tokens", "context_length_exceeded")
    assert client.post("/v1/completions", json={**TEXT, "max_tokens": 126}).status_code == 200


def test_too_large_a_body(client: TestClient) -> None:
    content = json.dumps({**TEXT, "prompt": "a" * 20_000})
    answer = client.post("/v1/completions", content=content)
    check(answer, 413, None, "request_too_large")

    def pieces() -> Any:  # no Content-Length
        for i in range(0, len(content), 1000):
            yield content[i : i + 1000].encode()

    answer = client.post("/v1/completions", content=pieces(), headers=JSON)
    check(answer, 413, None, "request_too_large")


def test_unknown_routes_and_methods(client: TestClient) -> None:
    check(client.get("/v2/models"), 404, None, "unknown_url")
    check(client.get("/v1/models/"), 404, "model", "model_not_found")
    answer = client.get("/v1/completions")
    check(answer, 405, None, "method_not_supported")
    assert answer.headers["allow"] == "POST"
    check(client.delete("/health"), 405, None, "method_not_supported")


def test_an_unexpected_error_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    error = as_api_error(RuntimeError("the secret path /etc/x"))
    assert error.status == 500
    assert "secret" not in error.message
    assert "secret path" in caplog.text


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (FinishReason.STOP, None),
        (FinishReason.LENGTH, None),
        (None, None),
        (FinishReason.DEADLINE, 504),
        (FinishReason.CANCELLED, 503),
        (FinishReason.ERROR, 500),
    ],
)
def test_failures_of_completions(reason: FinishReason | None, status: int | None) -> None:
    failure = failure_of(RequestOutput(request_id="r", finish_reason=reason))
    assert (failure and failure.status) == status


def test_an_engine_that_has_stopped(tiny_model: Path, tokenizer: Tokenizer) -> None:
    engine = AsyncEngine.from_config(
        EngineConfig(model=str(tiny_model), dtype="float32", threads=1, kv_cache_bytes=1 << 20)
    )
    service = Service(
        backend=LocalBackend(engine),
        tokenizer=tokenizer,
        model_name="tiny",
        defaults=Defaults(compute=ComputePolicy(), timeout_s=60),
    )
    app = create_app(service, key_digests=(), max_body_bytes=1000)
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        assert client.post("/v1/completions", json=TEXT).status_code == 200
        asyncio.run(engine.shutdown())
        for stream in (False, True):
            answer = client.post("/v1/completions", json={**TEXT, "stream": stream})
            check(answer, 503, None, "engine_unavailable")
        check(client.get("/ready"), 503, None, "engine_unavailable")
        assert client.get("/health").status_code == 200
        assert "fathom_replicas{" in client.get("/metrics").text


def test_a_deadline(tiny_model: Path, engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    service = Service(
        backend=LocalBackend(engine),
        tokenizer=tokenizer,
        model_name="tiny",
        defaults=Defaults(compute=ComputePolicy(), timeout_s=0.02),
    )
    app = create_app(service, key_digests=(), max_body_bytes=1000)
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        body = {**TEXT, "max_tokens": 120, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
        check(answer, 504, None, "deadline_exceeded")
