"""The dashboard as a server of its own, in front of one that runs elsewhere, or not yet.

It serves the pages, passes on what they ask of the server with its key, and reads studies itself
where it is given a tracking server.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fathom import __version__
from fathom.api.auth import KeyMiddleware, is_loopback, is_operation, may_operate
from fathom.api.errors import ApiError, install_error_handlers
from fathom.dashboard.routes import ROLLBACK, SITE, STUDIES, add_dashboard_routes

_METHODS = ["GET", "POST"]
_POINTS = "/v1/operating_points"
_PASSED = ("/v1/{path:path}", "/metrics", "/ready", "/health", "/version")
_STUDIES = (STUDIES, f"{STUDIES}/{{path:path}}", ROLLBACK)
_ASKED = ("accept", "content-type", "last-event-id", "x-request-id")
_ANSWERED = ("content-type", "content-encoding", "cache-control", "x-request-id", "retry-after")
_CONNECT_S = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Upstream:
    """The server behind the dashboard.

    Args:
        url: without a path. key: its API key; empty for none.
        operator_key: for what only operators may do; empty takes ``key``.
    """

    def __init__(self, url: str, key: str, operator_key: str = "") -> None:
        self.url = url.rstrip("/")
        self._key = key
        self._operator_key = operator_key
        self._client: httpx.AsyncClient | None = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold connections while the application runs."""
        # An answer may take as long as a request does; no proxy of the environment is between.
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        async with httpx.AsyncClient(
            base_url=self.url, headers=_bearer(self._key), timeout=timeout, trust_env=False
        ) as self._client:
            yield

    async def forward(self, request: Request) -> Response:
        """Pass a request on, and its answer back as it comes.

        Raises:
            ApiError: if the server does not answer, or does not take the key.
        """
        answer = await self._send(
            request.method,
            request.url.path + (f"?{request.url.query}" if request.url.query else ""),
            headers={
                **{k: v for k, v in request.headers.items() if k in _ASKED},
                # Nothing else gets this key, whatever its path may come to mean there.
                **(_bearer(self._operator_key) if is_operation(request.scope) else {}),
            },
            content=await request.body(),
        )
        kept = {k: v for k, v in answer.headers.items() if k in _ANSWERED}
        return _Relay(_pieces(answer), answer.status_code, kept)

    async def standing(self) -> dict[str, Any]:
        """See ``dashboard.control.Server``."""
        found: dict[str, Any] = await self.call("GET", _POINTS)
        return found

    async def take(self, body: Mapping[str, Any]) -> None:
        """See ``dashboard.control.Server``."""
        await self.call("POST", _POINTS, dict(body))

    async def roll_back(self) -> None:
        """See ``dashboard.control.Server``."""
        await self.call("POST", f"{_POINTS}/rollback")

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """A JSON answer of the server.

        Raises:
            ApiError: if the server does not answer or refuses, with its words.
        """
        answer = await self._send(method, path, json=body, headers=_bearer(self._operator_key))
        try:
            await answer.aread()
            found = answer.json()
        except (httpx.TransportError, ValueError) as error:
            raise self._unreachable(error) from error
        finally:
            await answer.aclose()
        if answer.is_error:
            own = found.get("error", {}) if isinstance(found, dict) else {}
            message = str(own.get("message", f"The server answers {answer.status_code}."))
            raise ApiError(answer.status_code, message, code=own.get("code"))
        return found

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        assert self._client is not None, "the application has not started"
        try:
            request = self._client.build_request(method, path, **content)
            # Compressed pieces of a stream would be held back.
            request.headers["accept-encoding"] = "identity"
            answer = await self._client.send(request, stream=True)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if answer.status_code == 401:
            await answer.aclose()
            raise ApiError(
                502,
                f"The server at {self.url} does not take the API key; FATHOM_API_KEY must hold one "
                "of its keys where `fathom dashboard` is started.",
                kind="server_error",
            )
        return answer

    def _unreachable(self, error: Exception) -> ApiError:
        words = " ".join(str(error).split()) or type(error).__name__
        return ApiError(
            502, f"The server at {self.url} does not answer ({words}).", kind="server_error"
        )


def create_proxy(
    upstream: Upstream,
    *,
    host: str,
    digests: Sequence[bytes],
    operators: Sequence[bytes] = (),
    mlflow: str = "",
) -> FastAPI:
    """Build the application.

    Args:
        host: address that it binds.
        digests: of the keys that open it: those of the server, for it can do what they can. Without
            any, only clients on this machine are served.
        operators: digests of the operators' keys among them, if the server has such.
        mlflow: tracking server that studies are read from; empty has the server read them.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with upstream.opened():
            yield

    app = FastAPI(
        title="Fathom dashboard",
        version=__version__,
        redirect_slashes=False,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    install_error_handlers(app)
    app.add_middleware(KeyMiddleware, digests=digests, operators=operators)
    if is_loopback(host):
        # A name that leads here from elsewhere is somebody's trick (DNS rebinding).
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*_LOOPBACK, host])
    passed = _PASSED if mlflow else (*_PASSED, *_STUDIES)
    if not mlflow:
        _add_site(app, upstream, operators, can_log_out=bool(digests))
    for path in passed:
        app.add_api_route(path, upstream.forward, methods=_METHODS, response_model=None)
    add_dashboard_routes(app, digests=digests, operators=operators, mlflow=mlflow, server=upstream)
    return app


def _add_site(
    app: FastAPI, upstream: Upstream, operators: Sequence[bytes], *, can_log_out: bool
) -> None:
    @app.get(SITE, response_model=None)
    async def site(request: Request) -> dict[str, Any]:
        """What the server says of itself, if it does, and this login."""
        try:
            found = await upstream.call("GET", SITE)
        except ApiError:
            found = {"version": __version__, "links": {}}
        may = found.get("can_promote", True) and may_operate(request.scope, operators)
        return {**found, "can_log_out": can_log_out, "can_promote": may}


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


class _Relay(StreamingResponse):
    """Passes pieces on, and lets the server know when the client goes away."""

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], status: int, headers: dict[str, str]
    ) -> None:
        super().__init__(pieces, status, headers)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            await super().__call__(scope, receive, send)


async def _pieces(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()
