"""Traces of requests to a real application, as they arrive at a receiver of OTLP over HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.convert import Defaults
from fathom.api.local import LocalBackend
from fathom.api.service import Service
from fathom.config import ConfigError, EngineConfig
from fathom.engine.async_engine import AsyncEngine
from fathom.models.tokenizer import load_tokenizer
from fathom.observability.tracing import Tracing, endpoint_of
from fathom.types import ComputePolicy
from tests.otlp import Receiver, values
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

FREE = {"mode": "free", "policy": "always"}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> AsyncEngine:
    return AsyncEngine.from_config(
        EngineConfig(
            model=str(tiny_model), dtype="float32", threads=1, kv_cache_bytes=4 << 20,
            pause_drafting=False, exit_layer=2, adapter="none",
        )
    )  # fmt: skip


@contextmanager
def client_of(engine: AsyncEngine, model: Path, tracing: Tracing | None) -> Iterator[TestClient]:
    service = Service(
        backend=LocalBackend(engine, interval_s=0.0),
        tokenizer=load_tokenizer(model),
        model_name="tiny",
        defaults=Defaults(compute=ComputePolicy(), timeout_s=60),
    )
    if tracing is not None:
        service.trace(tracing)
    app = create_app(service, key_digests=[], max_body_bytes=10_000)
    with TestClient(app, client=("127.0.0.1", 1), raise_server_exceptions=False) as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "abc", "max_tokens": 12, "ignore_eos": True,
            "compute": FREE, **fields}  # fmt: skip


def spans_of(receiver: Receiver) -> tuple[list[Span], list[Span]]:
    """Spans of requests, and their children."""
    whole = [span for span in receiver.spans if span.kind == Span.SPAN_KIND_SERVER]
    return whole, [span for span in receiver.spans if span.kind != Span.SPAN_KIND_SERVER]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span(
    engine: AsyncEngine, tiny_model: Path, receiver: Receiver, stream: bool
) -> None:
    tracing = Tracing(receiver.url, instance="ingress-1")
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "who=me",
               "X-Request-Id": "mine"}  # fmt: skip
    begin = time.time_ns()
    with client_of(engine, tiny_model, tracing) as client:
        asked = body(n=2, stream=stream, stream_options={"include_usage": True} if stream else None)
        answer = client.post("/v1/completions", json=asked, headers=headers)
        assert answer.status_code == 200, answer.text
    tracing.close()
    (span,), children = spans_of(receiver)
    assert receiver.headers["content-type"] == "application/x-protobuf"
    assert receiver.resource["service.name"] == "fathom-serve"
    assert receiver.resource["service.instance.id"] == "ingress-1"
    assert span.name == "text_completion tiny"
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
    assert span.trace_state == "who=me"
    found = values(span.attributes)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.request.id"] == "mine"
    assert found["gen_ai.request.n"] == 2
    assert found["gen_ai.request.max_tokens"] == 12
    for name in ("output_tokens", "completion_tokens"):
        assert found[f"gen_ai.usage.{name}"] == 24
    for name in ("input_tokens", "prompt_tokens"):
        assert found[f"gen_ai.usage.{name}"] == 3
    assert found["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert found["fathom.mode"] == "free"
    if not stream:
        told = answer.json()
        assert found["gen_ai.response.id"] == told["id"]
        page = told["usage"]["compute"]
        assert found["fathom.exited_tokens"] == page["exited"]
        assert found["fathom.exit_rate"] == pytest.approx(page["exit_rate"])
        assert found["fathom.layers_per_token"] == pytest.approx(page["layers_per_token"])
    assert found["fathom.exited_tokens"] > 0
    e2e, first = (found[f"gen_ai.latency.{n}"] for n in ("e2e", "time_to_first_token"))
    assert 0 < first < e2e
    assert begin < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(
        e2e, abs=0.01
    )
    assert {child.name for child in children} == {"fathom.first_token", "fathom.decode"}
    assert all(child.parent_span_id == span.span_id for child in children)
    by_name = {child.name: child for child in children}
    assert (
        by_name["fathom.first_token"].end_time_unix_nano
        == by_name["fathom.decode"].start_time_unix_nano
    )


def test_without_a_context_a_trace_begins_here(
    engine: AsyncEngine, tiny_model: Path, receiver: Receiver
) -> None:
    tracing = Tracing(receiver.url)
    with client_of(engine, tiny_model, tracing) as client:
        for traceparent in ("", "nonsense", f"00-{'0' * 32}-{PARENT}-01"):
            headers = {"traceparent": traceparent} if traceparent else {}
            assert client.post("/v1/completions", json=body(), headers=headers).status_code == 200
    tracing.close()
    spans, _ = spans_of(receiver)
    assert len({span.trace_id for span in spans}) == 3
    assert all(not span.parent_span_id for span in spans)


def test_a_caller_that_does_not_sample_is_not_traced(
    engine: AsyncEngine, tiny_model: Path, receiver: Receiver
) -> None:
    tracing = Tracing(receiver.url)
    with client_of(engine, tiny_model, tracing) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        assert client.post("/v1/completions", json=body(), headers=headers).status_code == 200
    tracing.close()
    assert receiver.spans == []


def test_a_failure_is_in_its_span(
    engine: AsyncEngine, tiny_model: Path, receiver: Receiver
) -> None:
    tracing = Tracing(receiver.url)
    with client_of(engine, tiny_model, tracing) as client:
        bad = body(compute={"mode": "free", "policy": "budget", "budget": 0.01})
        answer = client.post("/v1/completions", json=bad)
        assert answer.status_code == 400, answer.text
    tracing.close()
    (span,), _ = spans_of(receiver)
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert values(span.attributes)["error.type"] == "InvalidRequest"
    assert values(span.attributes)["gen_ai.usage.output_tokens"] == 0


def test_nobody_who_takes_spans_is_no_harm(
    engine: AsyncEngine, tiny_model: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    url = receiver.url
    receiver.close()
    tracing = Tracing(url)
    with client_of(engine, tiny_model, None) as plain, caplog.at_level(logging.CRITICAL):
        expected = plain.post("/v1/completions", json=body(seed=1)).json()["choices"]
        with client_of(engine, tiny_model, tracing) as client:
            for _ in range(5):
                answer = client.post("/v1/completions", json=body(seed=1))
                assert answer.json()["choices"] == expected
        begin = time.monotonic()
        tracing.close()
    assert time.monotonic() - begin < 20


def test_where_traces_go() -> None:
    assert endpoint_of("") == ""
    assert endpoint_of("http://here:1/v1/traces") == "http://here:1/v1/traces"
    base = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://there:4318/"}
    assert endpoint_of("", base) == ""  # off unless asked for
    assert endpoint_of("env", base) == "http://there:4318/v1/traces"
    own = {**base, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x/t"}
    assert endpoint_of("env", own) == "http://x/t"
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_ENDPOINT is set"):
        endpoint_of("env", {})
