"""The drill's client against a real server that breaks its connections on purpose."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fathom.drills.client import StreamClient
from fathom.drills.load import run_load
from fathom.drills.transcript import Transcript

WORDS = ["one", " two", " three", " four", " five"]
BODY = {"model": "m", "messages": [], "stream": True}


def events() -> list[str]:
    chunks: list[Any] = [
        {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
        for word in WORDS
    ]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    data = [*map(json.dumps, chunks), "[DONE]"]
    return [f"id: {number}\ndata: {each}\n\n" for number, each in enumerate(data, 1)]


@dataclass
class Breaking:
    """What the server does with one connection after another, and what it was asked.

    Attributes:
        acts: for each attempt ``("break", n)`` after n events, ``("tear", n)`` within the event
            after n, ``("end", n)`` properly but early, ``("status", code)``, ``("reset", 0)``
            before an answer, ``("hang", n)`` after n events, ``("repeat", n)``: the whole, with
            the n-th event twice. All later attempts get what is left.
    """

    acts: list[tuple[str, int]]
    asked: list[dict[str, str]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> tuple[str, int]:
        with self.lock:
            return self.acts.pop(0) if self.acts else ("all", 0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    breaking: Breaking

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.breaking.asked.append(dict(self.headers.items()))
        self.breaking.bodies.append(body)
        act, count = self.breaking.next()
        rest = events()[int(self.headers.get("Last-Event-ID", "0")) :]
        if act == "reset":
            return self._reset()
        if act == "status":
            words = b'{"error": {"message": "words"}}'
            self.send_response(count)
            self.send_header("Content-Length", str(len(words)))
            self.end_headers()
            self.wfile.write(words)
            return None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if act == "repeat":
            rest.insert(count, rest[count - 1])
        for event in rest if act in ("all", "repeat") else rest[:count]:
            self._chunk(event)
        if act == "tear":
            self._chunk(rest[count][:-4])
        if act == "hang":
            threading.Event().wait(3)
        if act in ("break", "tear", "hang"):
            # As a proxy does whose server has died; what was sent still arrives.
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        self._chunk("")
        return None

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _reset(self) -> None:
        """End the connection as the system does for a process that was killed."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        pass  # connections break on purpose


@pytest.fixture
def serve() -> Iterator[Any]:
    running = []

    def start(*acts: tuple[str, int]) -> tuple[Breaking, str]:
        breaking = Breaking(list(acts))
        handler = type("Handler", (Handler,), {"breaking": breaking})
        server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return breaking, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(url: str, **options: Any) -> Transcript:
    client = StreamClient(url, **{"pause_s": 0.01, "key": "secret", **options})
    return client.stream(BODY, "request-1")


def assert_whole(found: Transcript) -> None:
    assert found.error == ""
    assert found.done
    assert found.completions[0].text == "".join(WORDS)
    assert found.completions[0].finish_reason == "stop"
    assert (found.jumps, found.repeats) == (0, 0)


def test_an_undisturbed_stream_needs_one_connection(serve: Any) -> None:
    breaking, url = serve()
    found = ask(url)
    assert_whole(found)
    assert (found.reconnects, found.resumptions) == (0, 0)
    assert 0 < found.first_s <= found.seconds
    (headers,) = breaking.asked
    assert headers["Authorization"] == "Bearer secret"
    assert "Last-Event-ID" not in headers


@pytest.mark.parametrize("act", ["break", "tear", "end"])
@pytest.mark.parametrize("seen", [1, 3, 5])
def test_a_broken_stream_goes_on_after_the_last_whole_event(
    serve: Any, act: str, seen: int
) -> None:
    breaking, url = serve((act, seen))
    found = ask(url)
    assert_whole(found)
    assert (found.reconnects, found.resumptions) == (1, 1)
    assert [headers.get("Last-Event-ID") for headers in breaking.asked] == [None, str(seen)]
    assert {headers["X-Request-Id"] for headers in breaking.asked} == {"request-1"}
    assert breaking.bodies == [BODY, BODY]


@pytest.mark.parametrize("act", [("reset", 0), ("status", 500), ("status", 503), ("break", 0)])
def test_without_an_event_seen_the_request_is_sent_as_it_was(
    serve: Any, act: tuple[str, int]
) -> None:
    breaking, url = serve(act, act)
    found = ask(url)
    assert_whole(found)
    assert (found.reconnects, found.resumptions) == (2, 0)
    assert all("Last-Event-ID" not in headers for headers in breaking.asked)


def test_one_stream_survives_many_breaks(serve: Any) -> None:
    breaking, url = serve(
        ("reset", 0), ("break", 1), ("status", 503), ("tear", 1), ("break", 0), ("end", 2)
    )
    found = ask(url, tries=3)
    assert_whole(found)
    assert found.reconnects == 6
    assert found.resumptions == 3
    last = [headers.get("Last-Event-ID") for headers in breaking.asked]
    assert last == [None, None, "1", "1", "2", "2", "4"]


def test_a_silent_connection_counts_as_broken(serve: Any) -> None:
    _, url = serve(("hang", 2))
    found = ask(url, timeout_s=0.3)
    assert_whole(found)
    assert found.resumptions == 1


def test_attempts_are_bounded(serve: Any) -> None:
    breaking, url = serve(*[("status", 503)] * 9)
    found = ask(url, tries=3)
    assert found.failed
    assert "given up after 3 attempts" in found.error
    assert "503" in found.error
    assert len(breaking.asked) == 3


def test_nobody_listening_is_a_failure_after_all_attempts() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    found = ask(url, tries=2)
    assert "ConnectionRefusedError" in found.error


def test_a_request_at_fault_is_not_sent_again(serve: Any) -> None:
    breaking, url = serve(("status", 400))
    found = ask(url)
    assert found.error.startswith("400: ")
    assert "words" in found.error
    assert len(breaking.asked) == 1


def test_a_repeated_event_is_counted_and_kept(serve: Any) -> None:
    _, url = serve(("repeat", 2))
    found = ask(url)
    assert found.repeats == 1
    assert found.completions[0].text == "one two two three four five"


def test_load_keeps_to_its_places_and_answers_all(serve: Any) -> None:
    breaking, url = serve(*[("break", 2)] * 7)
    ended = []
    found = run_load(
        StreamClient(url, pause_s=0.01),
        [{**BODY, "seed": number} for number in range(20)],
        concurrency=4,
        name="load",
        on_end=lambda index, transcript: ended.append(index),
    )
    assert sorted(found) == sorted(ended) == list(range(20))
    for transcript in found.values():
        assert_whole(transcript)
    assert sum(transcript.reconnects for transcript in found.values()) == 7
    by_name = {
        (headers["X-Request-Id"], body["seed"])
        for headers, body in zip(breaking.asked, breaking.bodies, strict=True)
    }
    assert by_name == {(f"load-{number}", number) for number in range(20)}
