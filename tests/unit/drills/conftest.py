"""A server of event streams that breaks its connections on purpose, and processes to kill."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fathom.drills.killer import Victim

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


class Pool:
    """Processes of one kind; a dead one is started anew when ``mend`` is called."""

    def __init__(self, size: int) -> None:
        self.processes = [self._start() for _ in range(size)]

    @staticmethod
    def _start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])

    def ready(self, kind: str) -> list[Victim]:
        return [Victim(str(p.pid), p.pid) for p in self.processes if p.poll() is None]

    def fewest(self, kind: str) -> int:
        return 2

    def mend(self) -> None:
        self.processes = [p if p.poll() is None else self._start() for p in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def pool() -> Iterator[Pool]:
    found = Pool(2)
    yield found
    found.close()
