"""A bound on what a client may send before anyone looks at it."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.api.errors import body_too_large


class BodyLimitMiddleware:
    """Answers 413 to a body of more than ``limit`` bytes, whether its length is declared or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((v for name, v in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._limit:
            await body_too_large(self._limit).response()(scope, receive, send)
            return
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._limit:
                # An HTTPException passes through FastAPI's reading of the body.
                raise HTTPException(413, body_too_large(self._limit).message)
            return message

        await self._app(scope, counted, send)
