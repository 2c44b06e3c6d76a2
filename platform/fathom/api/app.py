"""The HTTP application: routes, with keys and limits in front of them and no framework's errors."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from prometheus_client import Metric
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from fathom import __version__
from fathom.api.auth import KeyMiddleware, owner_of
from fathom.api.backend import BackendUnavailable
from fathom.api.caller import Caller, RequestIdMiddleware, caller_of
from fathom.api.classify import ClassifierBackend, add_classify_route, classifier_card
from fathom.api.errors import install_error_handlers, model_not_found
from fathom.api.exits import add_exit_route
from fathom.api.limits import BodyLimitMiddleware
from fathom.api.points import add_point_routes
from fathom.api.promotion import Takeover
from fathom.api.schemas import ChatCompletionRequest, CompletionRequest
from fathom.api.service import Answer, Service
from fathom.api.sse import EventStream
from fathom.dashboard.control import OwnServer
from fathom.dashboard.routes import add_dashboard_routes
from fathom.observability.metrics import CONTENT_TYPE

AllMetrics = Callable[[], Awaitable[Mapping[str, Sequence[Metric]]]]
"""What every ingress has measured, by their names."""


def create_app(
    service: Service,
    *,
    key_digests: Sequence[bytes],
    operator_digests: Sequence[bytes] = (),
    max_body_bytes: int,
    echo_request_id: bool = True,
    all_metrics: AllMetrics | None = None,
    classifier: ClassifierBackend | None = None,
    takeover: Takeover | None = None,
    mlflow: str = "",
    links: Mapping[str, str] | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        key_digests: of the API keys (``auth.digests_from_env``); without any, only clients on
            this machine are served.
        operator_digests: of the operators' keys among them; with any, they alone may promote.
        max_body_bytes: largest request body.
        echo_request_id: put ``X-Request-Id`` on answers; not behind a proxy that does.
        all_metrics: where there are other ingresses than this one.
        classifier: what answers ``/v1/classify``, if anything.
        takeover: how the server takes operating points over, if it can.
        mlflow: tracking server that the dashboard reads studies from; empty for none.
        links: other pages that the dashboard links to, by their names.
    """
    app = FastAPI(
        title="Fathom",
        description="Language models at adaptive depth, behind OpenAI's protocol.",
        version=__version__,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    # The last one added runs first: no body is read before the key is known.
    app.add_middleware(BodyLimitMiddleware, limit=max_body_bytes)
    app.add_middleware(KeyMiddleware, digests=key_digests, operators=operator_digests)
    app.add_middleware(RequestIdMiddleware, echo=echo_request_id)
    _add_completion_routes(app, service)
    if classifier is not None:
        add_classify_route(app, classifier, service.metrics.of_classifier())
    _add_model_routes(app, service, classifier)
    add_exit_route(app, service)
    add_point_routes(app, service, takeover)
    _add_operator_routes(app, service, all_metrics)
    own = OwnServer(service, takeover) if takeover else None
    add_dashboard_routes(
        app,
        digests=key_digests,
        operators=operator_digests,
        mlflow=mlflow,
        links=links,
        server=own,
    )
    return app


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: HttpRequest) -> Response:
        return _respond(await service.chat(body, _caller(request)))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        return _respond(await service.completion(body, _caller(request)))

    @app.get("/v1/streams/{request_id:path}", response_model=None)
    async def stream(request_id: str, request: HttpRequest) -> Response:
        """The rest of a stream whose connection broke, after the event ``Last-Event-ID``."""
        caller = dataclasses.replace(_caller(request), request_id=request_id)
        return _respond(await service.stream(caller))


def _add_model_routes(app: FastAPI, service: Service, classifier: ClassifierBackend | None) -> None:
    created = int(time.time())

    async def cards() -> list[dict[str, Any]]:
        info = await service.info()
        model = {
            "id": service.model_name,
            "object": "model",
            "created": created,
            "owned_by": "fathom",
            "max_model_len": info.max_model_len,
            "num_layers": info.num_layers,
            "exit_layer": info.exit_layer,
            "exit_depth": info.exit_depth,
        }
        if classifier is None:
            return [model]
        return [model, classifier_card(await classifier.classifier_info(), created)]

    @app.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await cards()}

    # A model's name may hold slashes, as hub names do.
    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        for card in await cards():
            if card["id"] == name:
                return card
        raise model_not_found(name)


def _add_operator_routes(app: FastAPI, service: Service, all_metrics: AllMetrics | None) -> None:
    @app.get("/health", response_model=None)
    async def health() -> dict[str, str]:
        """Whether HTTP is served at all; needs no key."""
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> dict[str, Any]:
        """Whether a replica answers."""
        reports = await service.reports()
        if not reports:
            raise BackendUnavailable("No engine is up yet; try again in a few seconds.")
        return {"status": "ready", "replicas": len(reports)}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus metrics of the server and of every replica that answers."""
        ingresses = await all_metrics() if all_metrics else None
        shadow = await service.shadow_state()
        text = service.metrics.render(await service.reports(), ingresses, shadow)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    @app.get("/version", response_model=None)
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _caller(request: HttpRequest) -> Caller:
    return caller_of(request, owner_of(request.scope))


def _respond(answer: Answer) -> Response:
    if isinstance(answer, AsyncGenerator):
        return EventStream(answer)
    return _Json(answer)


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
