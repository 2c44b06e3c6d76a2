"""Plain HTTP against a real server: refusals through Serve's proxy, clients that go away."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.ray_fixtures import KEYS, TestServer

ENDLESS: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize(
    "path",
    [
        "/ready", "/metrics", "/version", "/v1/models", "/docs", "/openapi.json", "/nothing", "/",
        "/-/routes", "/-/healthz",  # Serve's proxy answers these two by itself
    ],
)  # fmt: skip
def test_keys_are_asked_for(server: TestServer, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with server.http(headers=headers) as http:
            answer = http.get(path)
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
            assert http.get("/health").status_code == 200


def test_every_key_opens(server: TestServer) -> None:
    for key in KEYS:
        with server.http(headers={"Authorization": f"Bearer {key}"}) as http:
            assert http.get("/ready").json() == {"status": "ready", "replicas": 1}
            assert http.get("/version").json()["version"]
            assert http.get("/-/healthz").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/nothing", None, 404, "unknown_url"),
        ("GET", "/v1/completions", None, 405, "method_not_supported"),
        ("POST", "/v1/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/completions", b"[]", 400, "invalid_json"),
        ("POST", "/v1/completions", b'{"model": "gpt-0", "prompt": "a"}', 404, "model_not_found"),
        ("POST", "/v1/completions", b" " * (9 << 20), 413, "request_too_large"),
    ],
)
def test_refusals(
    server: TestServer, method: str, path: str, content: bytes | None, status: int, code: str
) -> None:
    headers = {**server.headers, "Content-Type": "application/json"}
    with server.http(headers=headers) as http:
        answer = http.request(method, path, content=content)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: TestServer, stream: bool) -> None:
    server.wait_until_idle()
    before = server.metrics().get("fathom_request_success_total:cancelled", 0)
    address = urlsplit(server.url)
    body = json.dumps({"model": server.model, "stream": stream, **ENDLESS}).encode()
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {KEYS[0]}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        server.wait_for("fathom_num_requests_running", lambda value: value == 1)
        server.wait_for("fathom_kv_cache_usage_perc", lambda value: value > 0)
    left = time.monotonic()
    server.wait_until_idle()
    assert time.monotonic() - left < 10
    server.wait_for("fathom_request_success_total:cancelled", lambda value: value == before + 1)


def test_a_client_that_leaves_takes_all_its_completions_along(server: TestServer) -> None:
    server.wait_until_idle()
    with (
        server.http() as http,
        http.stream(
            "POST",
            "/v1/completions",
            json={
                "model": server.model, **ENDLESS, "prompt": ["One", "Two"], "n": 2, "stream": True,
            },
        ) as answer,
    ):  # fmt: skip
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.wait_for("fathom_num_requests_running", lambda value: value == 4)
    server.wait_until_idle()


def test_metrics_move(server: TestServer) -> None:
    server.wait_until_idle()
    before = server.metrics()
    body = {"model": server.model, "prompt": "One two three", "max_tokens": 5, "ignore_eos": True}
    with server.http() as http:
        assert http.post("/v1/completions", json=body).status_code == 200
    after = server.metrics()

    def moved(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert moved("fathom_generation_tokens_total") == 5
    assert moved("fathom_prompt_tokens_total") == 3
    assert moved("fathom_time_to_first_token_seconds_count") == 1
    assert moved("fathom_inter_token_latency_seconds_count") == 4
    assert moved("fathom_e2e_request_latency_seconds_count") == 1
    assert moved("fathom_request_success_total:length") == 1
    assert after["fathom_replicas"] == 1
    for name in ("exit_rate", "acceptance_rate", "layers_per_token", "flush_rows"):
        assert f"fathom_{name}" in after
