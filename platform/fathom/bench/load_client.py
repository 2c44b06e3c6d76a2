"""One streamed request, timed: what it brought, when, and how it failed if it did."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

_WORDS = 200
"""Characters of an error that are kept."""


@dataclass(slots=True)
class Answer:
    """What one request gave. Times are seconds, of ``time.perf_counter`` where absolute.

    Attributes:
        scheduled, sent: when it was to be sent, and when it was.
        ttft: from ``sent`` to the first chunk that had a choice; None if none came.
        itl: between such chunks; several tokens may travel in one.
        latency: from ``sent`` to the last such chunk.
        prompt_tokens, output_tokens: as the server counts them; None if it does not tell. Then
            ``chunks`` is the best guess for the latter.
        compute: Fathom's ``usage.compute``, where there is one.
        error: kind of failure, ``""`` for none; ``words`` are what is known of it.
    """

    scheduled: float = 0.0
    sent: float = 0.0
    ttft: float | None = None
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    chunks: int = 0
    compute: dict[str, Any] | None = None
    text: str = ""
    error: str = ""
    words: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return self.chunks if self.output_tokens is None else self.output_tokens

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for answers of one token."""
        if self.ttft is None or self.tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.tokens - 1)

    def fail(self, kind: str, words: str) -> None:
        """Note the failure; the first one counts."""
        if not self.error:
            self.error, self.words = kind, " ".join(words.split())[:_WORDS]


async def ask(
    client: httpx.AsyncClient, path: str, body: Mapping[str, Any], scheduled: float
) -> Answer:
    """Send a request with ``"stream": true`` and read its answer to the end.

    Never raises for what the server or the network does: see ``Answer.error``. Its kinds are
    ``http 429`` and so on, ``error event`` (in the stream), ``no tokens``, ``broken off`` (the
    stream ended without ``[DONE]``), ``timeout``, and httpx's own names, as ``ConnectError``.
    """
    found = Answer(scheduled=scheduled, sent=time.perf_counter())
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                words = (await response.aread()).decode(errors="replace")
                found.fail(f"http {response.status_code}", words)
                return found
            done = False
            async for data in _events(response):
                if data == "[DONE]":
                    done = True  # read on to the end: then the connection serves the next one
                elif not done:
                    _take(found, json.loads(data))
            if not done:
                found.fail("broken off", "the stream ended without [DONE]")
            elif found.ttft is None:
                found.fail("no tokens", "the stream ended without a token")
    except httpx.TimeoutException as error:
        found.fail("timeout", f"{type(error).__name__} {error}")
    except (httpx.HTTPError, httpx.StreamError) as error:
        found.fail(type(error).__name__, str(error))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        found.fail("malformed event", f"{type(error).__name__}: {error}")
    return found


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """Data of the events of a stream, as soon as they are whole."""
    rest = b""
    data: list[bytes] = []
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data).decode()
                data = []


def _take(found: Answer, event: dict[str, Any]) -> None:
    now = time.perf_counter()
    if "error" in event:
        found.fail("error event", json.dumps(event["error"]))
        return
    usage = event.get("usage")
    if usage:
        found.prompt_tokens = usage.get("prompt_tokens")
        found.output_tokens = usage.get("completion_tokens")
        found.compute = usage.get("compute")
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
        ended = choice.get("finish_reason") is not None
        if not text and not ended:
            continue  # says who speaks
        found.text += text
        at = now - found.sent
        if found.ttft is None:
            found.ttft = at
            found.chunks += 1
        elif text:
            found.itl.append(at - found.latency)
            found.chunks += 1
        found.latency = at
