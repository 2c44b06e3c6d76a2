"""Server-sent events: the wire form of a stream, and a response that closes what it reads."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "[DONE]"
_ID_LINE = re.compile(r"^id: \d+\n", re.MULTILINE)


def event(data: dict[str, Any] | str, number: int | None = None) -> str:
    """One event; JSON escapes line ends, so one line always holds it.

    Args:
        number: the event's id, by which a client that comes back names it; None for no id.
    """
    if not isinstance(data, str):
        data = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n" if number is None else f"id: {number}\ndata: {data}\n\n"


def without_ids(events: str) -> str:
    """Events of ``event`` as those see them who have not asked for ids."""
    return _ID_LINE.sub("", events)


class EventStream(StreamingResponse):
    """Sends the events of a generator, and closes it when the client goes away.

    Starlette leaves a generator that is suspended in a ``yield`` to the garbage collector; here
    closing it cancels a request, so it must happen at once.
    """

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        # Proxies such as nginx would hold back small pieces without the second header.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)
