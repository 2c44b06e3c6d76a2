"""The proxy before a real server on a socket, whose routes say what they were asked."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from fathom.api.auth import KeyMiddleware, digest
from fathom.api.sessions import LINK, issue
from fathom.dashboard.proxy import Upstream, create_proxy

KEY, OPERATOR = "secret", "operator"


class Asked:
    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.add_middleware(
            KeyMiddleware, digests=[digest(KEY), digest(OPERATOR)], operators=[digest(OPERATOR)]
        )
        self.promoted = 0

        @self.app.post("/v1/operating_points")
        async def promote() -> dict[str, bool]:
            self.promoted += 1
            return {"taken": True}

        @self.app.get("/dashboard/data/site")
        async def site() -> dict[str, object]:
            return {"version": "1", "links": {}, "can_promote": True}

        self.left = threading.Event()

        @self.app.get("/metrics")
        async def metrics(request: Request) -> dict[str, object]:
            return {"headers": dict(request.headers), "query": request.url.query}

        @self.app.post("/v1/echo")
        async def echo(request: Request) -> StreamingResponse:
            body = await request.body()

            async def pieces() -> AsyncIterator[bytes]:
                try:
                    for number in range(1000):
                        yield b"%d %s\n" % (number, body)
                        await asyncio.sleep(0.02)
                finally:
                    self.left.set()

            return StreamingResponse(pieces(), media_type="text/event-stream")


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def upstream(asked: Asked) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(asked.app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def proxy(url: str, key: str = KEY, **options: object) -> TestClient:
    app = create_proxy(Upstream(url, key), host="127.0.0.1", digests=[digest(KEY)], **options)  # type: ignore[arg-type]
    return TestClient(app, base_url="http://127.0.0.1:8500", raise_server_exceptions=False)


def test_requests_get_the_key_and_lose_the_session(upstream: str) -> None:
    with proxy(upstream) as client:
        assert client.get("/metrics").status_code == 401
        client.get("/dashboard/login", params={"link": issue(digest(KEY), kind=LINK)})
        found = client.get("/metrics?a=b%20c", headers={"x-other": "1"}).json()
        assert found["query"] == "a=b%20c"
        assert found["headers"]["authorization"] == f"Bearer {KEY}"
        assert not {"cookie", "x-other"} & set(found["headers"])
        assert client.get("/v2/else").status_code == 404
        assert client.get("/docs").status_code == 404


def test_answers_come_as_they_are_made_and_end_with_their_client(
    upstream: str, asked: Asked
) -> None:
    # Over a socket of its own: the test client would wait for the whole answer.
    app = proxy(upstream).app
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with socket.create_connection(listening.getsockname(), timeout=10) as client:
            client.sendall(
                b"POST /v1/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n"
                b"Authorization: Bearer secret\r\n\r\nhi"
            )
            begin, got = time.monotonic(), b""
            while b"3 hi" not in got:
                got += client.recv(4096)
            assert time.monotonic() - begin < 10  # all of it takes 20 s
            assert b"text/event-stream" in got
        assert asked.left.wait(10)
    finally:
        server.should_exit = True
        thread.join(10)


def test_no_server_and_a_wrong_key_are_told_apart(upstream: str) -> None:
    with proxy("http://127.0.0.1:1") as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        answer = client.get("/metrics")
        assert answer.status_code == 502
        assert "http://127.0.0.1:1 does not answer" in answer.json()["error"]["message"]
        assert client.get("/dashboard").status_code == 200
        assert client.get("/dashboard/data/site").json()["can_log_out"] is True
    with proxy(upstream, key="wrong") as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        answer = client.get("/metrics")
        assert answer.status_code == 502  # 401 would send the browser to a login that helps nobody
        assert "FATHOM_API_KEY" in answer.json()["error"]["message"]


def test_only_operators_promote_through_it(upstream: str, asked: Asked) -> None:
    app = create_proxy(
        Upstream(upstream, KEY, OPERATOR),
        host="127.0.0.1",
        digests=[digest(KEY), digest(OPERATOR)],
        operators=[digest(OPERATOR)],
    )
    with TestClient(app, base_url="http://127.0.0.1:8500") as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        assert client.post("/v1/operating_points").status_code == 403
        assert client.get("/dashboard/data/site").json()["can_promote"] is False
        assert not asked.promoted
        client.headers["authorization"] = f"Bearer {OPERATOR}"
        assert client.get("/dashboard/data/site").json()["can_promote"] is True
        assert client.post("/v1/operating_points").json() == {"taken": True}
    assert asked.promoted == 1


def test_a_path_that_is_written_otherwise_gets_no_operators_key(
    upstream: str, asked: Asked
) -> None:
    """What is no such path here would be one there: the client of HTTP takes dots out."""
    app = create_proxy(
        Upstream(upstream, KEY, OPERATOR),
        host="127.0.0.1",
        digests=[digest(KEY), digest(OPERATOR)],
        operators=[digest(OPERATOR)],
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        for path in (b"/v1/x/../operating_points", b"/v1/x/%2e%2e/operating_points"):
            with socket.create_connection(listening.getsockname(), timeout=10) as client:
                client.sendall(
                    b"POST " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n"
                    b"Connection: close\r\nAuthorization: Bearer secret\r\n\r\n"
                )
                got = b"".join(iter(lambda: client.recv(4096), b""))
            assert b" 403 " in got.partition(b"\r\n")[0], got
        assert not asked.promoted
    finally:
        server.should_exit = True
        thread.join(10)


def test_another_name_for_this_machine_is_refused(upstream: str) -> None:
    with proxy(upstream) as client:
        answer = client.get("/dashboard/login", headers={"host": "rebound.example"})
        assert answer.status_code == 400
