"""``fathom exits show``, over HTTP against a real server's answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from fathom.api.backend import ExitState
from fathom.api.exits import exits_body
from fathom.cli import main
from fathom.commands.exits import sparkline
from fathom.exits.live import LivePolicies
from fathom.types import AcceptMode, ComputePolicy, PolicyName

ADAPTIVE = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE)
RISK = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.RISK, risk=0.05, exit_threshold=0.8)
KEY = "a-key"


def seen() -> LivePolicies:
    """Policies that have seen 600 rows, and completions that break a promise."""
    policies, rng = LivePolicies(0.4), np.random.default_rng(0)
    for _ in range(600):
        sure = bool(rng.random() < 0.7)
        confidence = rng.beta(9, 1.5) if sure else rng.beta(1.5, 4)
        policies.observe(ADAPTIVE, float(confidence), bool(rng.random() < (0.95 if sure else 0.3)))
        policies.threshold_for(ADAPTIVE, 0, 1)
    for _ in range(80):
        policies.completed(RISK, exited=10, decided=20, asked=20, wrong=10)
    return policies


@pytest.fixture
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    states = [
        ExitState(replica=f"r{i}", state={"group": "g", "load_level": i, **seen().snapshot()})
        for i in range(getattr(request, "param", 2))
    ]
    body = json.dumps(exits_body(states)).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Authorization"] == f"Bearer {KEY}"
            self.send_response((200 if known else 401) if self.path == "/a/v1/exits" else 404)
            self.end_headers()
            self.wfile.write(body if known else b"who?")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FATHOM_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "200")
    yield f"http://127.0.0.1:{server.server_port}/a"
    server.shutdown()
    server.server_close()


def test_tables(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exits", "show", "--url", url]) == 0
    text = capsys.readouterr().out
    for words in ("All replicas together", "softmax_gap", "λ over time", "Promises", "r0", "r1"):
        assert words in text
    assert "1,200" not in text  # rows by verdict, which add up to it
    assert "160" in text  # completions
    assert "yes" in text
    assert any(block in text for block in "▃▄▅▆▇")


@pytest.mark.parametrize("url", [0, 1], indirect=True)
def test_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exits", "show", "--json", "--url", url]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["merged"]["engines"] == len(body["replicas"])
    assert main(["exits", "show", "--url", url]) == 0
    assert ("no draft seen yet" in capsys.readouterr().out) == (not body["replicas"])


def test_what_goes_wrong_is_said(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATHOM_API_KEY", "wrong")
    assert main(["exits", "show", "--url", url]) == 1
    assert "FATHOM_API_KEY must hold its key: who?" in capsys.readouterr().err
    assert main(["exits", "show", "--url", "localhost:1"]) == 2
    assert main(["exits", "show", "--url", "http://127.0.0.1:1"]) == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert main(["exits"]) == 2


def test_a_line_of_blocks() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.9] * 100) == "▇" * 40
    assert len(sparkline([0.1, 0.2] * 50, width=7)) == 7
