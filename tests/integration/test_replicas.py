"""A second application on the same Ray: two replicas, small limits, a short deadline."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import psutil
import pytest
import ray
from ray import serve

from tests.ray_fixtures import TestServer

DEADLINE_S = 8.0
LIMIT = 4  # two replicas with one request each, two waiting
LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def two(server: TestServer) -> Iterator[TestServer]:
    from deployments.app import build

    # The form of a Serve config file's args.
    application = build(
        {
            "engine": {
                "dtype": "bfloat16",
                "kv_cache_bytes": 128 << 20,
                "max_num_batched_tokens": 32,
                "compute": {"mode": "full"},
            },
            "num_replicas": 2,
            "cpus_per_replica": 0.5,
            "max_ongoing_requests": 1,
            "max_queued_requests": 2,
            "request_timeout_s": DEADLINE_S,
            "drain_s": 20,
        }
    )
    serve.run(application, name="two", route_prefix="/two")
    yield TestServer(url=f"{server.url}/two", model=server.model)
    serve.delete("two")


def post(server: TestServer, **fields: Any) -> httpx.Response:
    with server.http() as http:
        return http.post("/v1/completions", json={"model": server.model, **fields})


def test_both_replicas_report_and_work(two: TestServer) -> None:
    with two.http() as http:
        assert http.get("/ready").json()["replicas"] == 2
        with ThreadPoolExecutor(LIMIT) as pool:
            answers = list(
                pool.map(lambda i: post(two, prompt=f"{i} is", max_tokens=40), range(LIMIT))
            )
        text = http.get("/metrics").text
    assert [answer.status_code for answer in answers] == [200] * LIMIT
    assert answers[0].json()["usage"]["compute"]["mode"] == "full"
    name = "fathom_replica_generation_tokens_total{"
    lines = [line for line in text.splitlines() if line.startswith(name)]
    assert len(lines) == 2
    assert all(float(line.split()[-1]) > 0 for line in lines), lines


@pytest.mark.parametrize("stream", [True, False])
def test_what_only_the_engine_refuses(two: TestServer, stream: bool) -> None:
    answer = post(two, prompt="Hello", compute={"max_stack": 32}, stream=stream)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "compute.max_stack"
    assert error["message"].startswith("compute.max_stack must be below")


def test_a_full_server_answers_429_and_still_reports(two: TestServer) -> None:
    fields: dict[str, Any] = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(10) as pool:
        requests = [pool.submit(post, two, **fields) for _ in range(10)]
        two.wait_for("fathom_num_requests_running", lambda value: value == LIMIT)
        assert two.metrics()["fathom_replicas"] == 2
        answers = [request.result() for request in requests]
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) == LIMIT
    assert statuses.count(429) == 10 - LIMIT
    refused = answers[statuses.index(429)]
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert post(two, prompt="Hello", max_tokens=2).status_code == 200


def test_the_deadline_ends_requests_and_streams_with_an_event(two: TestServer) -> None:
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(post, two, **LONG, stream=True)
        answer = post(two, **LONG)
    assert time.monotonic() - start < DEADLINE_S + 5
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    answer = streamed.result()
    assert answer.status_code == 200
    *_, news, last = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    assert last == "data: [DONE]"
    assert json.loads(news[6:])["error"]["code"] == "deadline_exceeded"


def test_nobody_calls_a_replica_without_rays_token(two: TestServer) -> None:
    """Its port for calls over gRPC takes pickles: whoever can call it can run code."""
    table = ray._private.state.state.actor_table(None, None, "ALIVE")
    (pid, *_) = [a["Pid"] for a in table.values() if "two#Engine" in a["Name"]]
    ports = {c.laddr.port for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"}
    assert ports
    refusals = {port: refusal(port) for port in ports}
    assert grpc.StatusCode.UNAUTHENTICATED in refusals.values(), refusals
    assert None not in refusals.values(), refusals


def refusal(port: int) -> grpc.StatusCode | None:
    """How a call without a token is refused; None if it is not."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return None


def test_replicas_that_all_die_come_back(two: TestServer) -> None:
    """A request goes on for as long as it has time (see ``test_resume``), which is too short."""
    lines: list[str] = []

    def read() -> None:
        with (
            two.http() as http,
            http.stream(
                "POST", "/v1/completions", json={"model": two.model, **LONG, "stream": True}
            ) as answer,
        ):
            lines.extend(line for line in answer.iter_lines() if line.startswith("data: "))

    reader = threading.Thread(target=read)
    reader.start()
    two.wait_for("fathom_num_requests_running", lambda value: value == 1)
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("SERVE_REPLICA::two#Engine#"):
            ray.kill(ray.get_actor(actor["name"], namespace="serve"))
    with two.http() as http:
        assert http.get("/health").status_code == 200
        answer = http.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_unavailable"
        deadline = time.monotonic() + 120
        while http.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert lines[-1] == "data: [DONE]"
    error = json.loads(lines[-2][6:])["error"]
    assert error["code"] in ("engine_unavailable", "deadline_exceeded"), error
    assert post(two, prompt="Hello", max_tokens=2).status_code == 200


def test_stopping_lets_requests_finish(two: TestServer) -> None:
    fields = {**LONG, "max_tokens": 80}
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(post, two, **fields)
        two.wait_for("fathom_num_requests_running", lambda value: value >= 1)
        serve.delete("two")
        answer = request.result(timeout=60)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 80
