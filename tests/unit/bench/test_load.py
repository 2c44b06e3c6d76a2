"""Load on a server: times, one request's answer over a real connection, bodies."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.bench.load_client import Answer, ask
from fathom.bench.load_prompts import bodies_of, random_prompts
from fathom.bench.load_run import Target, run_load
from fathom.bench.load_schedule import arrival_times
from fathom.bench.serve_figures import load_row

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
rates = st.floats(0.01, 1000)


@given(st.integers(1, 200), rates, st.floats(0.01, 100), st.integers(0, 5))
def test_arrivals_ascend_and_end_on_time(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    times = arrival_times(count, rate, burstiness=burstiness, seed=seed)
    assert len(times) == count
    assert times == sorted(times)
    assert min(times) >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert times == arrival_times(count, rate, burstiness=burstiness, seed=seed)


@given(st.integers(0, 50), rates)
def test_ends_of_burstiness(count: int, rate: float) -> None:
    assert arrival_times(count, math.inf) == [0] * count
    even = arrival_times(count, rate, burstiness=math.inf)
    assert even == [pytest.approx((number + 1) / rate) for number in range(count)]


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_intervals_are_a_gamma_distribution(burstiness: float, spread: float) -> None:
    """Its coefficient of variation is 1 / sqrt(shape): 1 for Poisson."""
    times = arrival_times(20_000, 10, burstiness=burstiness, seed=3)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.1)
    assert deviation / mean == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (1, 0), (math.nan, 1)])
def test_what_is_no_rate(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        arrival_times(3, rate, burstiness=burstiness)


def chunk(text: str, end: str | None = None) -> str:
    delta = {"content": text} if text else {}
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": end}]})


OPENING = json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
USAGE = json.dumps(
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4,
                              "compute": {"layers_per_token": 9.5, "exit_rate": 0.5}}}
)  # fmt: skip
GOOD = (OPENING, chunk("a"), chunk("bc"), chunk("", "length"), USAGE, "[DONE]")


class Scripted:
    """A real HTTP server: what it sends is up to the test, byte by byte."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.pieces: Callable[[int], list[bytes]] = lambda number: [sse(*GOOD)]
        self.status: Callable[[int], int] = lambda number: 200
        self.pause_s = 0.0
        self.at_once = self.most = 0
        self.lock = threading.Lock()


def sse(*data: str, before: str = "") -> bytes:
    return "".join(f"{before}data: {each}\n\n" for each in data).encode()


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, Target]]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_POST(self) -> None:
            with script.lock:
                number = len(script.bodies)
                length = int(self.headers["Content-Length"])
                script.bodies.append(json.loads(self.rfile.read(length)))
                script.headers.append(dict(self.headers))
                script.at_once += 1
                script.most = max(script.most, script.at_once)
            self.send_response(script.status(number))
            self.end_headers()
            for piece in script.pieces(number):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(script.pause_s)
            with script.lock:
                script.at_once -= 1
            # Only with the connection's end has the client all of it.

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield script, Target(f"http://127.0.0.1:{server.server_port}", CHAT, timeout_s=2)
    server.shutdown()
    server.server_close()
    thread.join()


def one(target: Target) -> Answer:
    async def main() -> Answer:
        async with target.client() as client:
            return await ask(client, target.endpoint, {}, 0.0)

    return asyncio.run(main())


def test_an_answer_is_timed(scripted: tuple[Scripted, Target]) -> None:
    script, target = scripted
    script.pause_s = 0.05
    script.pieces = lambda number: [sse(each) for each in GOOD]
    found = one(target)
    assert (found.error, found.text, found.chunks, found.tokens) == ("", "abc", 2, 4)
    assert (found.prompt_tokens, found.compute["exit_rate"]) == (7, 0.5)
    # The opening that says who speaks is no token; the end without text brings no new one.
    assert found.ttft is not None and found.ttft >= 0.05
    # Sums: where this process is woken late, one time is longer and the next one shorter.
    assert len(found.itl) == 1 and found.ttft + found.itl[0] >= 0.1
    assert found.latency >= max(found.ttft + found.itl[0], 0.15)
    assert found.tpot == pytest.approx((found.latency - found.ttft) / 3)


@given(st.lists(st.integers(1, 40), max_size=12))
def test_events_come_in_any_pieces(sizes: list[int]) -> None:
    """However a stream is cut, and with ids, comments and other line ends, it says the same."""
    import httpx

    stream = sse(OPENING, chunk("é🙂"), before=": ping\n\nid: 4\n") + sse(*GOOD[1:]).replace(
        b"\n", b"\r\n"
    )
    pieces, rest = [], stream
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    pieces.append(rest)

    async def answer(request: httpx.Request) -> httpx.Response:
        async def content() -> Any:
            for piece in pieces:
                yield piece

        return httpx.Response(200, content=content())

    async def main() -> Answer:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await ask(client, CHAT, {}, 0.0)

    found = asyncio.run(main())
    assert (found.error, found.text, found.chunks) == ("", "é🙂abc", 3)


FAILURES = {
    "http 429": (429, [b'{"error": {"message": "too  many"}}']),
    "broken off": (200, [sse(*GOOD[:-1])]),
    "no tokens": (200, [sse(OPENING, "[DONE]")]),
    "error event": (200, [sse(chunk("a"), '{"error": {"message": "lost"}}', "[DONE]")]),
    "malformed event": (200, [sse("{nothing", "[DONE]")]),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_have_kinds(scripted: tuple[Scripted, Target], kind: str) -> None:
    script, target = scripted
    status, pieces = FAILURES[kind]
    script.status, script.pieces = lambda number: status, lambda number: pieces
    found = one(target)
    assert found.error == kind
    assert found.words
    assert "  " not in found.words


def test_silence_and_nobody_are_failures(scripted: tuple[Scripted, Target]) -> None:
    script, target = scripted
    script.pieces, script.pause_s = lambda number: [sse(OPENING)] * 2, 0.6
    assert one(Target(target.base_url, CHAT, timeout_s=0.2)).error == "timeout"
    assert one(Target("http://127.0.0.1:9", CHAT)).error == "ConnectError"


def test_a_closed_loop_keeps_its_places(scripted: tuple[Scripted, Target]) -> None:
    script, target = scripted
    script.pause_s = 0.02
    script.status = lambda number: 500 if number == 3 else 200
    ended: list[Answer] = []
    load = run_load(target, [{"n": n} for n in range(9)], None, max_concurrency=3,
                    on_end=ended.append)  # fmt: skip
    assert load.most_at_once == 3
    assert script.most <= 3
    assert len(load.answers) == len(ended) == 9
    assert sorted(body["n"] for body in script.bodies) == list(range(9))
    assert load.send_lag_s == []
    row = load_row(load, slo_ms={"ttft": 1500})
    # Nothing is dropped: what failed is told, and does not count as good.
    assert (row["completed"], row["failed"], row["errors"]) == (8, 1, {"http 500": 1})
    assert row["request_goodput"] == pytest.approx(8 / load.seconds)
    assert row["goodput_share"] == pytest.approx(8 / 9)
    assert row["output_throughput"] == pytest.approx(8 * 4 / load.seconds)
    assert row["total_input_tokens"] == 56
    assert row["compute"]["layers_per_token"] == 9.5


def test_an_open_loop_does_not_wait_for_answers(scripted: tuple[Scripted, Target]) -> None:
    script, target = scripted
    script.pause_s = 0.5
    script.pieces = lambda number: [sse(OPENING), sse(*GOOD[1:])]
    times = [0.0, 0.05, 0.1, 0.15]
    load = run_load(Target(target.base_url, CHAT, key="k"), [{}] * 4, times)
    assert load.most_at_once == 4
    assert script.headers[0]["Authorization"] == "Bearer k"
    first = load.answers[0].scheduled
    assert [answer.scheduled - first for answer in load.answers] == pytest.approx(times)
    assert all(answer.sent >= answer.scheduled for answer in load.answers)
    assert len(load.send_lag_s) == 4
    assert load.loop_lag_s


def test_random_prompts_differ_and_have_their_length() -> None:
    words = random_prompts(5, 30, seed=1)
    assert [len(str(prompt).split()) for prompt in words] == [30] * 5
    assert len({str(prompt)[:20] for prompt in words}) == 5
    assert words == random_prompts(5, 30, seed=1) != random_prompts(5, 30, seed=2)
    ids = random_prompts(3, 12, seed=1, vocab_size=9)
    assert all(len(prompt) == 12 and set(prompt) <= set(range(9)) for prompt in ids)


def test_bodies_fit_their_endpoint() -> None:
    messages = [{"role": "user", "content": "hi"}]

    def body(prompt: Any, endpoint: str, **extra: Any) -> dict[str, Any]:
        (found,) = bodies_of(
            [prompt], endpoint=endpoint, model="m", output_len=5, ignore_eos=True, extra=extra
        )
        return found

    assert body("hi", CHAT)["messages"] == body(messages, CHAT)["messages"] == messages
    assert body([1, 2], TEXT)["prompt"] == [1, 2]
    assert body("hi", TEXT, temperature=1) == {
        "model": "m", "prompt": "hi", "max_tokens": 5, "temperature": 1, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no token ids"):
        body([1, 2], CHAT)
    with pytest.raises(ValueError, match="no messages"):
        body(messages, TEXT)
