"""Traces of requests by OpenTelemetry, sent over OTLP/HTTP; off unless an endpoint is named.

A span a request, whose parent is the caller's ``traceparent`` if there is one, with two children:
until the first token, and from there to the end. Attributes follow OpenTelemetry's conventions for
generative AI and the names that vLLM gives beside them; what is Fathom's own is under ``fathom.``.
Spans leave from a thread of their own, in batches, and are dropped where nobody takes them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from fathom.api.caller import Caller
from fathom.api.records import Plan
from fathom.api.usage import add_compute
from fathom.settings import ConfigError
from fathom.types import Usage

FROM_ENVIRONMENT = "env"
"""An endpoint that the environment names, by OpenTelemetry's own variables."""

_PATH = "/v1/traces"
_TIMEOUT_S = 5.0
_OPERATIONS = {"chat": "chat", "completion": "text_completion"}


def endpoint_of(setting: str, environment: Mapping[str, str] = os.environ) -> str:
    """The URL that traces go to, for a setting of ``otlp_traces_endpoint``; empty for none.

    Raises:
        ConfigError: where the environment is to name it and does not.
    """
    if setting != FROM_ENVIRONMENT:
        return setting
    own = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not own and not base:
        raise ConfigError(
            "otlp_traces_endpoint is env, but neither OTEL_EXPORTER_OTLP_TRACES_ENDPOINT nor "
            "OTEL_EXPORTER_OTLP_ENDPOINT is set: set one, or name a URL."
        )
    return own or base.rstrip("/") + _PATH


class Tracing:
    """Traces the requests of one process.

    Args:
        endpoint: URL; see ``endpoint_of``. Headers for it, as a key, are taken from
            ``OTEL_EXPORTER_OTLP_HEADERS``.
        instance: name of this process.

    Raises:
        ConfigError: if OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, *, instance: str = "") -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"otlp_traces_endpoint needs OpenTelemetry ({error.name} is missing): run `pip "
                "install 'fathom-serve[otel]'` on every node."
            ) from error
        from fathom import __version__

        about = {"service.name": "fathom-serve", "service.version": __version__}
        if instance:
            about["service.instance.id"] = instance
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say wins.
        named = OTELResourceDetector().detect().attributes
        resource = Resource.create({**about, **named})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fathom", __version__)

    def begin(self, caller: Caller, plan: Plan) -> RequestSpan:
        """Begin the span of a request that has been found to be valid."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": caller.traceparent, "tracestate": caller.tracestate}
        # One that is malformed is passed over, as the standard wants it.
        parent = TraceContextTextMapPropagator().extract(carrier)
        operation, model = _OPERATIONS[plan.endpoint], plan.style.model
        first = plan.requests[0]
        params, compute = first.sampling, first.compute
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "fathom",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.id": plan.style.response_id,
            "gen_ai.request.id": caller.request_id,
            "gen_ai.request.n": first.n * len(plan.requests),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "fathom.mode": compute.mode.value,
            "fathom.policy": compute.policy.value,
            "fathom.operating_point": compute.operating_point,
        }
        span = self._tracer.start_span(
            f"{operation} {model}", parent, kind=SpanKind.SERVER, attributes=attributes
        )
        return RequestSpan(self._tracer, span)

    def close(self) -> None:
        """Send what is left, for some seconds at most; blocks."""
        self._provider.shutdown()


class RequestSpan:
    """The span of one request under way."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        self._start = time.time_ns()
        self._first = 0

    def tokens(self) -> None:
        """Note that tokens have come."""
        if not self._first:
            self._first = time.time_ns()

    def end(
        self,
        usages: Mapping[tuple[int, int], Usage],
        reasons: list[str],
        error: BaseException | None,
    ) -> None:
        """End it.

        Args:
            usages: of the completions that have ended. reasons: why each has.
        """
        from opentelemetry.trace import StatusCode, set_span_in_context

        now, span = time.time_ns(), self._span
        span.set_attributes(_attributes(usages, reasons))
        span.set_attribute("gen_ai.latency.e2e", (now - self._start) / 1e9)
        context = set_span_in_context(span)
        parts = [("fathom.first_token", self._start, self._first or now)]
        if self._first:
            waited = (self._first - self._start) / 1e9
            span.set_attribute("gen_ai.latency.time_to_first_token", waited)
            parts.append(("fathom.decode", self._first, now))
        for name, start, end in parts:
            self._tracer.start_span(name, context, start_time=start).end(end)
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR, str(error))
        span.end(now)


def _attributes(usages: Mapping[tuple[int, int], Usage], reasons: list[str]) -> dict[str, Any]:
    prompts = {prompt: usage for (prompt, _), usage in sorted(usages.items(), reverse=True)}
    page = add_compute(usage.compute for usage in usages.values())
    asked = sum(usage.prompt_tokens for usage in prompts.values())
    given = sum(usage.completion_tokens for usage in usages.values())
    found: dict[str, Any] = {
        "gen_ai.response.finish_reasons": reasons,
        # The conventions' names, and those that vLLM has kept.
        "gen_ai.usage.input_tokens": asked,
        "gen_ai.usage.output_tokens": given,
        "gen_ai.usage.prompt_tokens": asked,
        "gen_ai.usage.completion_tokens": given,
        "gen_ai.usage.num_sequences": len(usages),
        "fathom.cached_tokens": sum(usage.cached_tokens for usage in prompts.values()),
        "fathom.exited_tokens": page.exited,
        "fathom.exit_rate": page.exit_rate,
        "fathom.layers_per_token": page.layers_per_token,
        "fathom.drafted_tokens": page.drafted,
        "fathom.flushes": page.flushes,
        "fathom.probes": page.probes,
        "fathom.flops": page.flops,
        "fathom.resumptions": page.resumptions,
        "fathom.load_shifted_tokens": page.load_shifted,
    }
    if page.acceptance_rate is not None:
        found["fathom.acceptance_rate"] = page.acceptance_rate
    if page.realised_budget is not None:
        found["fathom.realised_budget"] = page.realised_budget
    return found
