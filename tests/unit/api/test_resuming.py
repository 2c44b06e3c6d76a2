"""Streams that are cut anywhere and gone on with: no gap, no duplicate, the same answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.api.caller import Caller
from fathom.api.convert import Defaults
from fathom.api.journal import Answer, Entry, JournalLost, MemoryJournal, NotTaken, Taken
from fathom.api.local import LocalBackend
from fathom.api.records import StreamKey
from fathom.api.schemas import ChatCompletionRequest, CompletionRequest
from fathom.api.service import Service
from fathom.engine.async_engine import AsyncEngine
from fathom.models.tokenizer import Tokenizer
from fathom.types import ComputePolicy
from tests.unit.api.scripted import ScriptedEngine

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 40,
    "stream": True,
    "stream_options": {"include_usage": True},
    "depths": True,
}
TEXT: dict[str, Any] = {
    "model": "tiny",
    "prompt": ["hi", "ho"],
    "n": 2,
    "max_tokens": 24,
    "stream": True,
    "stream_options": {"include_usage": True},
}
BODIES = {
    "chat": CHAT,
    "chat without detail": {**CHAT, "depths": False, "stream_options": None, "stop": "漢"},
    "logprobs": {**CHAT, "logprobs": True, "n": 3, "max_tokens": 16},
    "text": TEXT,
    "echo": {**TEXT, "echo": True, "stop": ["a", "é🙂"], "logprobs": 0},
}


class FlakyJournal:
    """A journal that can go away and come back empty."""

    def __init__(self, keep_s: float = 60.0, max_bytes: int = 1 << 20) -> None:
        self._limits: Any = {"keep_s": keep_s, "max_bytes": max_bytes}
        self.memory = MemoryJournal(**self._limits)
        self.answers = asyncio.Event()
        self.answers.set()
        self.is_dead = False

    def restart(self) -> None:
        self.memory = MemoryJournal(**self._limits)

    async def append(self, entries: Sequence[Entry]) -> Answer:
        await self._reach()
        return self.memory.append(entries)

    async def take(
        self, key: StreamKey, *, after: int, body: bytes | None = None
    ) -> Taken | NotTaken:
        await self._reach()
        return self.memory.take(key, after=after, body=body)

    async def _reach(self) -> None:
        await self.answers.wait()
        if self.is_dead:
            raise JournalLost("dead")


def make_service(
    engine: Any, tokenizer: Tokenizer, journal: FlakyJournal | None, **more: Any
) -> Service:
    service = Service(
        backend=engine,
        tokenizer=tokenizer,
        model_name="tiny",
        defaults=Defaults(compute=ComputePolicy(), timeout_s=60),
        journal=journal,
        **more,
    )
    scribe = service._streams._scribe
    if scribe is not None:
        scribe._patience_s, scribe._interval_s = 0.02, 0.001
    return service


async def ask(service: Service, body: dict[str, Any], caller: Caller) -> Any:
    if "messages" in body:
        return await service.chat(ChatCompletionRequest(**body), caller)
    return await service.completion(CompletionRequest(**body), caller)


def parse(text: str) -> list[tuple[int | None, str]]:
    """(id, data) of events."""
    events = []
    for event in text.split("\n\n"):
        if event:
            fields = dict(line.split(": ", 1) for line in event.split("\n"))
            assert set(fields) <= {"id", "data"}
            events.append((int(fields["id"]) if "id" in fields else None, fields["data"]))
    return events


def join(data: Sequence[str]) -> dict[str, Any]:
    """What a client puts together from a stream's events."""
    assert data[-1] == "[DONE]" and data.count("[DONE]") == 1
    whole: dict[str, Any] = {"usage": None}
    for line in data[:-1]:
        chunk = json.loads(line)
        assert "error" not in chunk, chunk
        whole.setdefault("id", chunk["id"])
        assert chunk["id"] == whole["id"]
        whole["usage"] = chunk.get("usage") or whole["usage"]
        for choice in chunk["choices"]:
            of = whole.setdefault(choice["index"], {"text": "", "depths": [], "logprobs": []})
            assert "finish_reason" not in of, "nothing comes after the end"
            delta = choice.get("delta", {})
            assert delta.get("role") is None or not of["text"]
            of["text"] += delta.get("content", "") if delta else choice.get("text", "")
            of["depths"] += choice.get("depths", [])
            logprobs = choice["logprobs"] or {}
            of["logprobs"] += logprobs.get("content") or logprobs.get("tokens") or []
            if choice["finish_reason"]:
                of["finish_reason"] = choice["finish_reason"]
                of["stop_reason"] = choice.get("stop_reason")
    del whole["id"]
    return whole


@dataclass
class Client:
    """Reads a stream in as many connections as it takes.

    Attributes:
        seen: data of the events by their ids, replays compared with what was seen before.
    """

    body: dict[str, Any]
    request_id: str = "stream-1"
    seen: dict[int, str] = field(default_factory=dict)
    unnumbered: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def connect(self, service: Service, after: int | None) -> AsyncIterator[Any]:
        caller = Caller(request_id=self.request_id, owner=b"me", last_event_id=after)
        stream = await ask(service, self.body, caller)
        async with aclosing(stream) as events:
            yield self.read(events, after or 0)

    async def read(self, events: Any, last: int) -> AsyncIterator[int]:
        async for text in events:
            for number, data in parse(text):
                if number is None:
                    self.unnumbered.append(data)
                    continue
                assert number == last + 1, "no gap and no duplicate"
                last = number
                assert self.seen.setdefault(number, data) == data, "replayed as it was"
                yield number

    @property
    def done(self) -> bool:
        return bool(self.seen) and self.seen[max(self.seen)] == "[DONE]"

    def answer(self) -> dict[str, Any]:
        assert sorted(self.seen) == list(range(1, len(self.seen) + 1))
        return join([self.seen[number] for number in sorted(self.seen)])


async def undisturbed(body: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    service = make_service(ScriptedEngine(0), tokenizer, None)
    text = "".join([t async for t in await ask(service, body, Caller(request_id="r"))])
    assert "id: " not in text, "events of a stream that is not kept have no ids"
    return join([data for _, data in parse(text)])


cuts = st.lists(
    st.fixed_dictionaries(
        {
            "events": st.integers(0, 20),  # read before the cut
            "forget": st.integers(0, 4),  # events seen, but not told when coming back
            "stays": st.booleans(),  # the former server goes on as if nothing had happened
            "journal": st.sampled_from([None, "restarts", "is out for a while"]),
        }
    ),
    max_size=5,
)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(BODIES)),
    seed=st.integers(0, 1000),
    pieces=st.integers(0, 1000),
    cuts=cuts,
)
def test_a_stream_survives_its_servers(
    tokenizer: Tokenizer, name: str, seed: int, pieces: int, cuts: list[dict[str, Any]]
) -> None:
    body = {**BODIES[name], "seed": seed}

    async def run() -> None:
        journal = FlakyJournal()
        engine = ScriptedEngine(pieces, pause_s=0.002)
        client = Client(body)
        async with asyncio.TaskGroup() as zombies:
            after: int | None = None
            for cut in cuts:
                service = make_service(engine, tokenizer, journal)
                await connect_and_leave(client, service, journal, cut, after, zombies)
                if client.done:
                    break
                after = max(0, len(client.seen) - cut["forget"]) if client.seen else None
            service = make_service(engine, tokenizer, journal)
            async with client.connect(service, after) as numbers:
                async for _ in numbers:
                    pass
        assert client.answer() == await undisturbed(body, tokenizer)
        assert not client.unnumbered
        assert not engine.running

    asyncio.run(run())


async def connect_and_leave(
    client: Client,
    service: Service,
    journal: FlakyJournal,
    cut: dict[str, Any],
    after: int | None,
    zombies: asyncio.TaskGroup,
) -> None:
    left = asyncio.Event()

    async def serve() -> None:
        async with client.connect(service, after) as numbers:
            count = 0
            async for _ in numbers:
                count += 1
                if count == (cut["events"] + 1) // 2 and cut["journal"] and not client.done:
                    await lose(journal, cut["journal"], service)
                if count >= cut["events"]:
                    break
            left.set()
            if cut["stays"]:
                # Nobody reads, and nobody tells it so.
                logs = service._streams._scribe._logs
                while any(not (log.taken_over or log.is_complete) for log in logs):
                    await asyncio.sleep(0.002)

    serving = zombies.create_task(serve())
    await left.wait()
    if not cut["stays"]:
        await serving


async def lose(journal: FlakyJournal, how: str, service: Service) -> None:
    """Lose the journal in the middle of a stream, and wait until it knows the stream again."""
    scribe = service._streams._scribe
    if not scribe._logs:
        return  # this connection only replays a stream that had ended
    journal.restart()
    if how == "is out for a while":
        journal.is_dead = True
        await asyncio.sleep(0.005)
        journal.is_dead = False
    for log in scribe._logs:
        scribe._is_due(log)
    while not len(journal.memory):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "compute",
    [
        {"mode": "full"},
        {"mode": "exact", "policy": "always"},
        {"mode": "rollback", "policy": "threshold", "exit_threshold": 0.3},
        {"mode": "free", "policy": "forced", "forced_exit_rate": 0.5, "max_stack": 3},
        {"mode": "copy", "policy": "forced", "forced_exit_rate": 0.5},
    ],
    ids=lambda compute: str(compute["mode"]),
)
@pytest.mark.parametrize("events", [1, 9])
def test_the_engine_goes_on_where_it_was(
    engine: AsyncEngine, tokenizer: Tokenizer, compute: dict[str, Any], events: int
) -> None:
    """Drawn tokens, text of half characters held back, two completions a prompt."""
    body = {
        **TEXT, "max_tokens": 30, "temperature": 1.0, "seed": 3, "depths": True, "ignore_eos": True,
        "compute": compute, "logprobs": 1,
    }  # fmt: skip
    backend = LocalBackend(engine, interval_s=0.0)

    async def run() -> None:
        whole = make_service(backend, tokenizer, None)
        text = "".join([t async for t in await ask(whole, body, Caller(request_id="r"))])
        journal = FlakyJournal()
        client = Client(body)
        while not client.done:
            service = make_service(backend, tokenizer, journal)
            async with client.connect(service, len(client.seen) or None) as numbers:
                left = events
                async for _ in numbers:
                    left -= 1
                    if not left:
                        break
        expected, answer = join([data for _, data in parse(text)]), client.answer()
        usage = answer.pop("usage")
        assert usage["completion_tokens"] == expected.pop("usage")["completion_tokens"] == 120
        assert usage["compute"]["decided"] == 120
        for choice in (*expected.values(), *answer.values()):
            choice.pop("logprobs")  # rounded otherwise in other batches
        assert answer == expected

    asyncio.run(run())
