"""A streaming client that comes back when its connection breaks, as any client of ours may."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from fathom.drills.events import read_events
from fathom.drills.transcript import Transcript

CHAT = "/v1/chat/completions"
RETRIED = frozenset({500, 502, 503})
"""Answers that say that the server, not the request, is at fault. A process that dies with a
request in its hands leaves one of them behind if no byte of an answer had left yet."""

_LONGEST_PAUSE_S = 2.0


class StreamClient:
    """Streams answers. One object serves many threads; each stream has connections of its own.

    When a connection breaks, the stream ends without ``[DONE]``, or the server answers one of
    ``RETRIED``, the same body is sent again with the same ``X-Request-Id``, and with the last id
    seen as ``Last-Event-ID``, after a pause that doubles. Nothing else is put right: an error in
    a stream fails the request.

    Args:
        url: of the server, without a path.
        key: its API key, empty for none.
        tries: attempts in a row that bring no event, before the request has failed.
        timeout_s: silence after which a connection counts as broken.
        pause_s: the first pause.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        tries: int = 12,
        timeout_s: float = 60.0,
        pause_s: float = 0.1,
    ) -> None:
        address = urllib.parse.urlsplit(url)
        self._host, self._port = address.hostname or "", address.port
        # Whoever accepts event streams is told the events' ids.
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._tries = tries
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._reading: set[str] = set()
        self._coming_back: set[str] = set()

    @property
    def reading(self) -> int:
        """Streams that have brought an event on the connection that they have now."""
        return len(self._reading)

    @property
    def coming_back(self) -> int:
        """Streams that have brought events, lost their connection, and have not gone on yet."""
        return len(self._coming_back)

    def stop(self) -> None:
        """Let streams under way end at their next event, as failed."""
        self._stopped.set()

    def stream(self, body: Mapping[str, Any], request_id: str, path: str = CHAT) -> Transcript:
        """Send a request with ``"stream": true``, and stay with it until it has ended.

        Never raises for what the server or the network does: see ``Transcript.error``.
        """
        found = Transcript()
        start = time.perf_counter()
        fruitless, pause = 0, self._pause_s
        while True:
            before = found.last_id
            reason = self._attempt(found, body, request_id, path, start)
            with self._lock:
                self._reading.discard(request_id)
                if found.last_id is not None:
                    self._coming_back.add(request_id)
            if found.done or found.error:
                break
            place = f"at {time.perf_counter() - start:.1f} s after event {found.last_id}"
            found.breaks.append(f"{place}: {reason}")
            if found.last_id != before:
                fruitless, pause = 0, self._pause_s
            fruitless += 1
            if fruitless >= self._tries:
                found.error = f"given up after {fruitless} attempts without an event: {reason}"
                break
            if self._stopped.wait(pause):
                found.error = "stopped"
                break
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            found.reconnects += 1
        with self._lock:
            self._coming_back.discard(request_id)
        found.seconds = time.perf_counter() - start
        return found

    def _attempt(
        self,
        found: Transcript,
        body: Mapping[str, Any],
        request_id: str,
        path: str,
        start: float,
    ) -> str:
        """Use one connection; returns why it ended, if neither ``done`` nor ``error`` says so."""
        headers = {**self._headers, "X-Request-Id": request_id}
        resumed = found.last_id is not None
        if resumed:
            headers["Last-Event-ID"] = str(found.last_id)
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                words = response.read().decode(errors="replace")
                if response.status not in RETRIED:
                    found.error = f"{response.status}: {words}"
                return f"{response.status}: {words[:200]}"
            for event in read_events(response):
                with self._lock:
                    self._reading.add(request_id)
                    self._coming_back.discard(request_id)
                found.resumptions += resumed
                resumed = False
                if found.add(event):
                    found.last_s = time.perf_counter() - start
                    if found.first_s is None:
                        found.first_s, found.first_tokens = found.last_s, found.num_tokens
                if found.done or found.error:
                    return ""
                if self._stopped.is_set():
                    found.error = "stopped"
                    return ""
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        return "the stream ended early"
