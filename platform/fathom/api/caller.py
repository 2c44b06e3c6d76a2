"""Who calls, and by which names: the headers around a request, checked before anything else."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.api.errors import ApiError

REQUEST_ID = "X-Request-Id"
SESSION_ID = "X-Session-Id"
LAST_EVENT_ID = "Last-Event-ID"
EVENT_STREAM = "text/event-stream"
MAX_NAME = 128
_MAX_DIGITS = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request, and what its headers call it.

    Attributes:
        request_id: the client's, or one made here. session_id: empty for none.
        last_event_id: number of the last event that the client saw of this stream; None if the
            request does not go on with a stream that it knows.
        event_ids: whether the events of a stream go to it with their ids.
        owner: digest of the API key; empty on a server without keys.
        traceparent, tracestate: W3C trace context, as sent; empty for none.
    """

    request_id: str
    session_id: str = ""
    last_event_id: int | None = None
    event_ids: bool = True
    owner: bytes = b""
    traceparent: str = ""
    tracestate: str = ""

    @property
    def tenant(self) -> str:
        """A name for the owner that tells nothing of its key."""
        return hashlib.sha256(b"fathom tenant:" + self.owner).hexdigest()[:32]


def caller_of(connection: HTTPConnection, owner: bytes = b"") -> Caller:
    """The caller of a request.

    Ids of events go to those who ask for them: by ``Accept: text/event-stream``, as readers of
    event streams by the standard do, or by coming back for a stream. Many clients of the OpenAI
    API (vLLM's benchmark among them) know no lines but ``data:``, and fail at others.

    Args:
        owner: digest of its API key, once that is checked.

    Raises:
        ApiError: 400 naming a header whose value cannot be used.
    """
    headers = connection.headers
    last = headers.get(LAST_EVENT_ID, "").strip()
    if last and not (last.isascii() and last.isdigit() and len(last) <= _MAX_DIGITS):
        raise _bad_header(
            LAST_EVENT_ID, last, "the id of the last event seen, an integer of at least 0"
        )
    return Caller(
        request_id=_name(headers, REQUEST_ID) or uuid.uuid4().hex,
        session_id=_name(headers, SESSION_ID),
        last_event_id=int(last) if last else None,
        event_ids=bool(last)
        or connection.scope.get("method") == "GET"
        or EVENT_STREAM in headers.get("accept", "").lower(),
        owner=owner,
        traceparent=headers.get("traceparent", ""),
        tracestate=headers.get("tracestate", ""),
    )


def _name(headers: Headers, header: str) -> str:
    if header not in headers:
        return ""
    name = headers[header]
    if not 1 <= len(name) <= MAX_NAME or not all(" " <= char <= "~" for char in name):
        raise _bad_header(header, name, f"1 to {MAX_NAME} printable ASCII characters")
    return name


def _bad_header(header: str, value: str, remedy: str) -> ApiError:
    shown = value if len(value) <= MAX_NAME else f"{value[:MAX_NAME]}..."
    return ApiError(400, f"{header} must be {remedy}, got {shown!r}.", param=header)


class RequestIdMiddleware:
    """Checks the headers that name a request, and puts ``X-Request-Id`` on every answer, once.

    Stands first, in front of the check of keys: also a refusal has an id. A request without one
    goes on with the one made here.

    Args:
        echo: put the id on answers; not where something in front does, as Serve's proxy.
    """

    def __init__(self, app: ASGIApp, *, echo: bool = True) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer: ASGIApp = self._app
        try:
            request_id = caller_of(HTTPConnection(scope)).request_id
        except ApiError as error:
            answer, request_id = error.response(), uuid.uuid4().hex
        headers = MutableHeaders(scope=scope)
        headers[REQUEST_ID] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and self._echo:
                # Not appended: Serve's proxy puts one of its own there.
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await answer(scope, receive, send_with_id)
