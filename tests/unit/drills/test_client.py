"""The drill's client against a real server that breaks its connections on purpose."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fathom.drills.client import StreamClient
from fathom.drills.load import run_load
from fathom.drills.transcript import Transcript
from tests.unit.drills.conftest import BODY, WORDS


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
    assert len(found.breaks) == 6
    assert "503" in found.breaks[2]
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


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_client_tells_which_streams_are_read_and_which_have_to_come_back(serve: Any) -> None:
    _, url = serve(("hang", 2), ("hang", 0))
    client = StreamClient(url, pause_s=0.01, timeout_s=0.4)
    thread = threading.Thread(target=client.stream, args=(BODY, "request-1"))
    thread.start()
    until(lambda: client.reading == 1)
    assert client.coming_back == 0
    until(lambda: client.coming_back == 1)
    assert client.reading == 0
    thread.join(20)
    assert (client.reading, client.coming_back) == (0, 0)


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
