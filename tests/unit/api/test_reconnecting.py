"""Coming back for a stream, over HTTP: ids, headers, refusals; and a journal that fails."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.auth import digest
from fathom.api.caller import Caller
from fathom.api.errors import ApiError
from fathom.models.tokenizer import Tokenizer
from tests.unit.api.scripted import INFO, ScriptedEngine
from tests.unit.api.test_errors import check
from tests.unit.api.test_resuming import CHAT, TEXT, Client, FlakyJournal, ask, make_service, parse

KEY = {"Authorization": "Bearer unit-key"}
OTHER_KEY = {"Authorization": "Bearer other"}


@pytest.fixture
def scripted() -> ScriptedEngine:
    return ScriptedEngine(1)


@pytest.fixture
def http(scripted: ScriptedEngine, tokenizer: Tokenizer) -> Iterator[TestClient]:
    service = make_service(scripted, tokenizer, FlakyJournal(), isolate_tenants=True)
    keys = [digest("unit-key"), digest("other")]
    app = create_app(service, key_digests=keys, max_body_bytes=10_000)
    with TestClient(app, headers=KEY) as client:
        yield client


def post(http: TestClient, body: dict[str, Any], **headers: str) -> Any:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return http.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_events_are_numbered_for_who_asks(http: TestClient) -> None:
    answer = post(http, CHAT, Accept="text/event-stream", X_Request_Id="mine")
    events = parse(answer.text)
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    assert events[-1][1] == "[DONE]"
    for headers in ({"Accept": "application/json"}, {"Accept": "*/*"}):
        plain = post(http, CHAT, **headers, X_Request_Id=str(headers))
        # Clients that know nothing but data would fail at any other line.
        assert all(line.startswith("data: ") for line in plain.text.split("\n") if line)
        assert parse(plain.text)[-1][1] == "[DONE]"


def test_a_stream_that_began_without_ids_can_be_gone_on_with(http: TestClient) -> None:
    whole = post(http, CHAT, Accept="text/event-stream", X_Request_Id="mine").text
    events = parse(whole)
    # The same again without ids, what is left after the second event, and all of it by name.
    assert parse(post(http, CHAT, X_Request_Id="mine").text) == [(None, d) for _, d in events]
    rest = post(http, CHAT, X_Request_Id="mine", Last_Event_ID="2")
    assert parse(rest.text) == events[2:]
    assert http.get("/v1/streams/mine").text == whole


def test_every_answer_has_an_id(http: TestClient) -> None:
    for path in ("/health", "/v1/models", "/nothing"):
        ids = {http.get(path).headers["x-request-id"] for _ in range(2)}
        assert len(ids) == 2
        assert http.get(path, headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    refused = http.get("/v1/models", headers={"Authorization": "Bearer no", "X-Request-Id": "mine"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (401, "mine")
    assert post(http, {**CHAT, "model": "gpt-0"}, X_Request_Id="mine").headers["x-request-id"]
    for stream in (True, False):
        body = {**CHAT, "stream": stream, "stream_options": None}
        assert post(http, body, X_Request_Id=f"is {stream}").headers["x-request-id"].startswith("i")


@pytest.mark.parametrize("header", ["X-Request-Id", "X-Session-Id"])
@pytest.mark.parametrize("value", ["", "a" * 129, "caf\xe9", "a\tb"])
def test_names_are_checked(http: TestClient, header: str, value: str) -> None:
    answer = http.get("/v1/models", headers={header: value.encode("latin-1")})
    message = check(answer, 400, header)
    assert "printable ASCII" in message
    assert answer.headers["x-request-id"]
    assert http.get("/v1/models", headers={header: "~" * 128}).status_code == 200


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "1" * 19, "²"])
def test_the_last_event_id_is_a_number(http: TestClient, value: str) -> None:
    answer = http.post(
        "/v1/completions", json=TEXT, headers={"Last-Event-ID": value.encode("latin-1", "replace")}
    )
    if value == "²":
        value = "\xb2"
    check(answer, 400, "Last-Event-ID")


def test_a_stream_that_ended_is_replayed(http: TestClient, scripted: ScriptedEngine) -> None:
    asking = {"Accept": "text/event-stream", "X_Request_Id": "a b/c?"}
    first = parse(post(http, CHAT, **asking).text)
    again = parse(post(http, CHAT, X_Request_Id="a b/c?", Last_Event_ID="3").text)
    assert again == first[3:]
    assert parse(post(http, CHAT, **asking).text) == first
    pretty = json.dumps(dict(reversed(CHAT.items())), indent=1)  # the same request
    answer = http.post(
        "/v1/chat/completions",
        content=pretty,
        headers={
            "X-Request-Id": "a b/c?",
            "Accept": "text/event-stream",
            "content-type": "application/json",
        },
    )
    assert parse(answer.text) == first
    got = http.get("/v1/streams/a%20b/c%3F", headers={"Last-Event-ID": "4"})
    assert parse(got.text) == first[4:]
    assert parse(http.get("/v1/streams/a%20b/c%3F").text) == first
    assert len(scripted.requests) == 1
    assert "fathom_streams_resumed_total" in http.get("/metrics").text


def test_what_cannot_be_gone_on_with(http: TestClient) -> None:
    post(http, CHAT, X_Request_Id="mine")
    answer = post(http, CHAT, X_Request_Id="unknown", Last_Event_ID="3")
    assert "without Last-Event-ID" in check(answer, 404, "X-Request-Id", "stream_not_found")
    check(http.get("/v1/streams/unknown"), 404, "X-Request-Id", "stream_not_found")
    answer = post(http, {**CHAT, "seed": 9}, X_Request_Id="mine", Last_Event_ID="3")
    assert "another body" in check(answer, 409, "X-Request-Id", "request_id_in_use")
    answer = post(http, CHAT, X_Request_Id="mine", Last_Event_ID="999")
    check(answer, 404, "Last-Event-ID", "event_not_found")
    answer = http.get("/v1/streams/mine", headers=OTHER_KEY)
    check(answer, 404, "X-Request-Id", "stream_not_found")
    answer = http.post(
        "/v1/chat/completions",
        json=CHAT,
        headers={**OTHER_KEY, "X-Request-Id": "mine", "Last-Event-ID": "1"},
    )
    check(answer, 404, "X-Request-Id", "stream_not_found")
    plain = {**CHAT, "stream": False, "stream_options": None}
    check(post(http, plain, X_Request_Id="mine", Last_Event_ID="1"), 400, "Last-Event-ID")


def test_a_whole_answer_is_computed_again(http: TestClient, scripted: ScriptedEngine) -> None:
    body = {**CHAT, "stream": False, "stream_options": None, "seed": 1}
    first, again = (post(http, body, X_Request_Id="same").json() for _ in range(2))
    assert first["choices"] == again["choices"]
    assert len(scripted.requests) == 2


def test_sessions_and_tenants_reach_the_engine(http: TestClient, scripted: ScriptedEngine) -> None:
    post(http, CHAT, X_Session_Id="session 1")
    post(http, {**CHAT, "cache_salt": "s"}, Authorization="Bearer other")
    post(http, {**CHAT, "cache_salt": "s"})
    one, other, salted = scripted.requests
    assert (one.session_id, other.session_id) == ("session 1", "")
    assert len({one.cache_salt, other.cache_salt, salted.cache_salt}) == 3
    assert salted.cache_salt == f"{one.cache_salt}s"
    assert digest("unit-key").hex() not in one.cache_salt


def test_without_a_journal_nothing_is_kept(tokenizer: Tokenizer) -> None:
    service = make_service(ScriptedEngine(1), tokenizer, None)
    app = create_app(service, key_digests=[], max_body_bytes=10_000)
    with TestClient(app, client=("127.0.0.1", 1)) as http:
        assert "id: " not in post(http, CHAT, Accept="text/event-stream", X_Request_Id="mine").text
        answer = post(http, CHAT, X_Request_Id="mine", Last_Event_ID="1")
        check(answer, 404, "X-Request-Id", "stream_not_found")


def test_a_new_model_does_not_go_on_with_an_old_ones_stream(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        journal, engine = FlakyJournal(), ScriptedEngine(1, pause_s=0.005)
        service = make_service(engine, tokenizer, journal)
        client = Client(CHAT)
        async with client.connect(service, None) as numbers:
            await anext(numbers)
        engine.info = dataclasses.replace(INFO, weights_digest="new")
        newer = make_service(engine, tokenizer, journal)
        await newer.reports()
        with pytest.raises(ApiError) as caught:
            await ask(newer, CHAT, Caller(request_id="stream-1", owner=b"me"))
        assert caught.value.code == "model_changed"

    asyncio.run(run())


def test_the_second_connection_takes_the_stream(tokenizer: Tokenizer) -> None:
    """On the same server, which has not noticed that the first connection broke."""

    async def run() -> None:
        engine = ScriptedEngine(1, pause_s=0.005)
        service = make_service(engine, tokenizer, FlakyJournal())
        client = Client(CHAT)
        async with client.connect(service, None) as former:
            for _ in range(4):
                await anext(former)
            async with client.connect(service, 2) as latter:
                await anext(latter)
                stale = [number async for number in former]
                assert len(stale) <= 2, "it stops"
                async for _ in latter:
                    pass
        assert client.done
        error, done = client.unnumbered
        assert json.loads(error)["error"]["code"] == "stream_taken_over"
        assert done == "[DONE]"
        assert not engine.running
        assert len({request.request_id for request in engine.requests}) == 2

    asyncio.run(run())


@pytest.mark.parametrize("how", ["dead", "hangs"])
def test_streams_go_on_without_the_journal(
    tokenizer: Tokenizer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        journal, engine = FlakyJournal(), ScriptedEngine(1, pause_s=0.02)
        service = make_service(engine, tokenizer, journal)
        client = Client({**CHAT, "max_tokens": 100})
        async with client.connect(service, None) as numbers:
            for _ in range(3):
                await anext(numbers)
            journal.is_dead = how == "dead"
            if how == "hangs":
                journal.answers.clear()
            start = time.monotonic()
            for _ in range(5):
                await anext(numbers)
            assert time.monotonic() - start < 1
            with pytest.raises(ApiError) as caught:
                await impatient(service)
            assert caught.value.code == "journal_unavailable"
            journal.restart()  # it comes back empty
            journal.is_dead = False
            journal.answers.set()
            while not journal.memory.unfinished:
                await anext(numbers)
        # Cut when the journal was back: what was sent meanwhile is there as well.
        service = make_service(engine, tokenizer, journal)
        async with client.connect(service, 5) as numbers:
            async for _ in numbers:
                pass
        client.answer()
        assert "fathom_journal_losses_total{model_name" in str(service.metrics.render([]))

    asyncio.run(run())
    assert "does not answer" in caplog.text
    assert "answers again" in caplog.text


async def impatient(service: Any) -> None:
    async with asyncio.timeout(3):
        await service.stream(Caller(request_id="stream-1", owner=b"me", last_event_id=1))


def test_a_full_journal_holds_no_stream_up(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        journal = FlakyJournal(max_bytes=6000)
        service = make_service(ScriptedEngine(1, pause_s=0.001), tokenizer, journal)
        clients = [Client({**CHAT, "seed": i}, f"stream-{i}") for i in range(4)]

        async def read(client: Client) -> None:
            async with client.connect(service, None) as numbers:
                async for _ in numbers:
                    pass

        await asyncio.gather(*map(read, clients))
        for client in clients:
            client.answer()
        assert journal.memory.nbytes <= 6000

    asyncio.run(run())


def test_a_live_stream_without_news_is_kept(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        journal = FlakyJournal(keep_s=0.3)
        engine = ScriptedEngine(1)
        service = make_service(engine, tokenizer, journal, keep_streams_s=0.3)
        client = Client(CHAT)
        async with client.connect(service, None) as numbers:
            await anext(numbers)
            engine._pause_s = 1.0  # the next news take long
            await asyncio.sleep(0.8)
            journal.memory.expire()
            assert len(journal.memory) == 1
        engine._pause_s = 0.0
        await asyncio.sleep(0.4)
        journal.memory.expire()
        assert len(journal.memory) == 0

    asyncio.run(run())


def test_no_engine_now_is_no_end_of_the_stream(tokenizer: Tokenizer) -> None:
    """The client is told, and can come back later for the rest."""

    async def run() -> None:
        journal = FlakyJournal()
        engine = ScriptedEngine(1, pause_s=0.002)
        service = make_service(engine, tokenizer, journal)
        client = Client(CHAT)
        engine.fails_after = 5
        async with client.connect(service, None) as numbers:
            async for _ in numbers:
                pass
        assert not client.done
        error, done = client.unnumbered
        assert json.loads(error)["error"]["code"] == "engine_unavailable"
        assert done == "[DONE]"
        engine.fails_after = None
        async with client.connect(service, len(client.seen)) as numbers:
            async for _ in numbers:
                pass
        client.answer()

    asyncio.run(run())
