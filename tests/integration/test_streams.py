"""Streams over a real cluster whose ingresses and journal are killed under them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from deployments.journal import JournalActor, unfinished_streams
from fathom.drills.client import StreamClient
from tests.ray_fixtures import KEYS, TestServer

PATH = "/v1/completions"
ROUTE = f"/streams{PATH}"
INGRESSES = "SERVE_REPLICA::streams#Ingress#"
JOURNAL = "journal-of-streams"
BODY: dict[str, Any] = {
    "prompt": "A long story about a lighthouse and its keeper:",
    "max_tokens": 120,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def streams(server: TestServer) -> Iterator[TestServer]:
    from deployments.app import build

    application = build(
        {
            "engine": {"dtype": "float32", "kv_cache_bytes": 128 << 20},
            "num_ingress_replicas": 2,
            "cpus_per_replica": 0.5,
            "keep_streams_s": 30,
            "drain_s": 2,
        }
    )
    serve.run(application, name="streams", route_prefix="/streams")
    yield TestServer(url=f"{server.url}/streams", model=server.model)
    serve.delete("streams")
    until(lambda: not pids_of(JOURNAL), 30)  # nobody is left who needs it


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def pids_of(prefix: str) -> list[int]:
    """Processes of the live actors whose names begin so."""
    table = ray._private.state.state.actor_table(None, None, "ALIVE")
    return [actor["Pid"] for actor in table.values() if actor["Name"].startswith(prefix)]


def text_of(server: TestServer, **fields: Any) -> str:
    """The undisturbed answer."""
    with server.http() as http:
        answer = http.post(PATH, json={"model": server.model, **BODY, **fields})
    return str(answer.json()["choices"][0]["text"])


def read(answer: httpx.Response) -> Iterator[tuple[int, str]]:
    """(id, data) of the events of an answer."""
    number = 0
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            number = int(value)
        elif name == "data":
            yield number, value


def join(events: list[tuple[int, str]]) -> str:
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    assert events[-1][1] == "[DONE]"
    chunks = [json.loads(data) for _, data in events[:-1]]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_a_client_comes_back_for_the_rest(streams: TestServer) -> None:
    body = {"model": streams.model, **BODY, "stream": True}
    with streams.http() as http:
        asking = {"Accept": "text/event-stream"}
        with http.stream("POST", PATH, json=body, headers=asking) as answer:
            (name,) = answer.headers.get_list("x-request-id")
            events = [event for event, _ in zip(read(answer), range(5), strict=False)]
        until(lambda: unfinished_streams("streams") == 1)
        seen = str(events[-1][0])
        rest = http.get(f"/v1/streams/{name}", headers={"Last-Event-ID": seen})
        events += list(read(rest))
        assert join(events) == text_of(streams)
        # The same by the same request, to whichever ingress, also when the stream has ended.
        again = http.post(PATH, json=body, headers={"X-Request-Id": name, "Last-Event-ID": "2"})
        assert list(read(again)) == events[2:]
        for wrong in ("unknown", f"{name}x"):
            gone = http.get(f"/v1/streams/{wrong}", headers={"Last-Event-ID": seen})
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "stream_not_found")
        bad = http.get("/ready", headers={"X-Request-Id": b"\xff"})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "X-Request-Id")


def test_many_prompts_of_one_request_are_routed_at_once(streams: TestServer) -> None:
    """For Serve, all calls for one HTTP request have the same id."""
    prompts = [f"{i} is" for i in range(16)]
    for _ in range(3):
        with streams.http() as http:
            body = {"model": streams.model, "prompt": prompts, "max_tokens": 2, "ignore_eos": True}
            choices = http.post(PATH, json=body).json()["choices"]
        assert len(choices) == len(prompts)


def test_the_journal_dies_under_a_stream(streams: TestServer) -> None:
    body = {"model": streams.model, **BODY, "max_tokens": 400, "stream": True}
    with streams.http() as http:
        asking = {"X-Request-Id": "one", "Accept": "text/event-stream"}
        with http.stream("POST", PATH, json=body, headers=asking) as answer:
            reading = read(answer)
            events = [next(reading) for _ in range(5)]
            (journal,) = pids_of(JOURNAL)
            os.kill(journal, signal.SIGKILL)
            killed = time.monotonic()
            events += [next(reading) for _ in range(5)]
            assert time.monotonic() - killed < 10, "it goes on without the journal"
            # It starts anew, empty, and is told the whole stream again.
            while pids_of(JOURNAL) in ([], [journal]) or not unfinished_streams("streams"):
                events.append(next(reading))
        headers = {"X-Request-Id": "one", "Last-Event-ID": str(events[-1][0])}
        events += list(read(http.post(PATH, json=body, headers=headers)))
    assert join(events) == text_of(streams, max_tokens=400)


def test_an_ingress_dies_under_its_streams(server: TestServer, streams: TestServer) -> None:
    prompts = [f"Chapter {i}. In the harbour" for i in range(4)]
    expected = [text_of(streams, prompt=prompt) for prompt in prompts]
    client = StreamClient(server.url, key=KEYS[0])
    body = {"model": streams.model, **BODY, "stream": True}
    for victim in pids_of(INGRESSES):
        with ThreadPoolExecutor(len(prompts)) as pool:
            running = [
                pool.submit(client.stream, {**body, "prompt": prompt}, f"{victim} {i}", ROUTE)
                for i, prompt in enumerate(prompts)
            ]
            until(lambda: unfinished_streams("streams") >= len(prompts))
            os.kill(victim, signal.SIGKILL)
            found = [each.result() for each in running]
        for transcript, text in zip(found, expected, strict=True):
            assert (transcript.error, transcript.jumps, transcript.repeats) == ("", 0, 0)
            assert transcript.completions[0].text == text
        if any(transcript.resumptions for transcript in found):
            break  # one of the four was with the victim: almost always
    else:
        pytest.fail("no ingress had a stream")
    until(lambda: len(pids_of(INGRESSES)) == 2, 120)


def test_a_journal_that_nobody_needs_ends_itself(streams: TestServer) -> None:
    options = {"name": "alone", "lifetime": "detached", "num_cpus": 0, "max_restarts": -1}
    actor = ray.remote(JournalActor).options(**options).remote(1.0, 1 << 20, alone_s=2.0)
    assert ray.get(actor.attend.remote(1.0)) == 0
    until(lambda: not pids_of("alone"), 30)
