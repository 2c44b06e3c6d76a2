"""The journal's memory: epochs, bounds, expiry, and what a restart does to its writers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.api.journal import Answer, Entry, MemoryJournal, NotTaken, Taken, Verdict
from fathom.api.records import News, Plan, Progress, events_after, given_by, rest_of
from fathom.api.responses import Style
from fathom.types import Request, Resumed, SamplingParams, Token, Usage

OWNER = b"owner"


def plan(name: str = "r", owner: bytes = OWNER, body: bytes = b"body") -> Plan:
    return Plan(
        key=(owner, name),
        body=body,
        endpoint="chat",
        style=Style(response_id="chatcmpl-1", model="m", fingerprint="f"),
        requests=(
            Request(
                request_id="chatcmpl-1",
                prompt_token_ids=(1, 2),
                n=2,
                timeout_s=10.0,
                sampling=SamplingParams(max_tokens=5, seed=1, prompt_logprobs=0),
            ),
        ),
        with_usage=False,
        started=100.0,
    )


def news(*events: str, ended: bool = False) -> News:
    return News(events, (Progress(0, (7,), (2,), characters=1),), ended)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def journal(keep_s: float = 60.0, max_bytes: int = 1 << 20, **more: Any) -> MemoryJournal:
    return MemoryJournal(keep_s=keep_s, max_bytes=max_bytes, **more)


def whole(name: str, *pieces: News, epoch: int = 1) -> Entry:
    return Entry((OWNER, name), epoch, 0, pieces, plan(name))


def verdicts(answer: Answer) -> list[str]:
    return [verdict.value for verdict in answer.verdicts]


def take(memory: MemoryJournal, name: str = "r", after: int = 0) -> Taken:
    taken = memory.take((OWNER, name), after=after, body=b"body")
    assert isinstance(taken, Taken)
    return taken


def test_news_follow_each_other() -> None:
    memory = journal()
    assert verdicts(memory.append([whole("r", news("a"))])) == ["kept"]
    key = (OWNER, "r")
    more = [Entry(key, 1, 1, (news("b"), news("c"))), Entry(key, 1, 3, ())]
    assert verdicts(memory.append(more)) == ["kept", "kept"]
    assert verdicts(memory.append([Entry(key, 1, 1, (news("b"),))])) == ["unknown"]
    assert verdicts(memory.append([Entry(key, 1, 9, (news("x"),))])) == ["unknown"]
    assert events_after(take(memory).news, 1) == ["b", "c"]
    # Whole again, after an answer that was lost: nothing is there twice.
    memory.append([dataclasses.replace(whole("r", news("a"), news("b")), epoch=2**63)])
    assert events_after(take(memory).news, 0) == ["a", "b"]


def test_who_takes_a_stream_shuts_its_former_writer_out() -> None:
    memory = journal()
    memory.append([whole("r", news("a"))])
    key = (OWNER, "r")
    first = take(memory)
    assert first.epoch > 1
    assert verdicts(memory.append([Entry(key, 1, 1, (news("b"),))])) == ["taken"]
    assert verdicts(memory.append([whole("r", news("z"))])) == ["taken"]
    second = take(memory)
    assert second.epoch > first.epoch
    assert [event for piece in second.news for event in piece.events] == ["a"]
    assert verdicts(memory.append([Entry(key, first.epoch, 1, (news("b"),))])) == ["taken"]
    assert verdicts(memory.append([Entry(key, second.epoch, 1, (news("b"),))])) == ["kept"]


def test_after_a_restart_the_latest_writer_wins_again() -> None:
    memory = journal()
    memory.append([whole("r", news("a"))])
    old, taken = memory.append([]).incarnation, take(memory)
    memory = journal()
    key = (OWNER, "r")
    assert verdicts(memory.append([whole("r", news("a"), news("stale"))])) == ["kept"]
    answer = memory.append([Entry(key, taken.epoch, 1, (news("b"),))])
    assert verdicts(answer) == ["unknown"]
    assert answer.incarnation != old
    assert verdicts(memory.append([whole("r", news("a"), news("b"), epoch=taken.epoch)])) == [
        "kept"
    ]
    assert verdicts(memory.append([Entry(key, 1, 2, ())])) == ["taken"]


def test_refusals_leave_the_writer_alone() -> None:
    memory = journal()
    memory.append([whole("r", news("a"))])
    key = (OWNER, "r")
    assert memory.take((b"another", "r"), after=0) is NotTaken.UNKNOWN
    assert memory.take((OWNER, "s"), after=0) is NotTaken.UNKNOWN
    assert memory.take(key, after=0, body=b"other") is NotTaken.OTHER_BODY
    assert memory.take(key, after=2, body=b"body") is NotTaken.BEHIND
    assert verdicts(memory.append([Entry(key, 1, 1, (news("b"),))])) == ["kept"]
    assert isinstance(memory.take(key, after=2), Taken)  # without the body


def test_what_nobody_mentions_is_forgotten() -> None:
    clock = Clock()
    memory = journal(keep_s=10, clock=clock)
    memory.append([whole("ended", news("a", ended=True)), whole("live", news("a"))])
    assert memory.unfinished == 1
    clock.now = 8
    memory.append([Entry((OWNER, "live"), 1, 1, ())])  # no news, but alive
    clock.now = 11
    assert memory.take((OWNER, "ended"), after=0) is NotTaken.UNKNOWN
    assert not take(memory, "live").ended
    clock.now = 22
    memory.expire()
    assert (len(memory), memory.nbytes) == (0, 0)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 400), st.booleans()), min_size=1, max_size=60
    )
)
def test_bytes_stay_below_the_bound(steps: list[tuple[int, int, bool]]) -> None:
    memory = journal(max_bytes=6000)
    written: dict[str, int] = {}
    for number, size, anew in steps:
        name = str(number)
        start = 0 if anew else written.get(name, 0)
        entry = Entry((OWNER, name), 1, start, (news("e" * size),), None if start else plan(name))
        (verdict,) = memory.append([entry]).verdicts
        written[name] = start + 1 if verdict is Verdict.KEPT else 0
        assert 0 <= memory.nbytes <= 6000
        assert memory.nbytes == sum(record.nbytes for record in memory._records.values())
        for (_, known), record in memory._records.items():
            assert len(record.news) == written[known]


def test_the_least_recently_written_goes_first() -> None:
    memory = journal(max_bytes=5000)
    memory.append([whole(name, news("e")) for name in "abc"])
    memory.append([Entry((OWNER, "a"), 1, 1, ())])
    assert verdicts(memory.append([whole("d", news("e" * 1500))])) == ["kept"]
    assert memory.take((OWNER, "b"), after=0) is NotTaken.UNKNOWN
    assert isinstance(memory.take((OWNER, "a"), after=0), Taken)
    assert verdicts(memory.append([whole("e", news("e" * 9000))])) == ["unknown"]
    assert len(memory) >= 2, "one that never fits drives nobody out"


def test_what_is_left_to_do() -> None:
    scored = (Token(1, 4), Token(2, 4, logprob=-1.0))
    usage = Usage(2, 2)
    pieces = [
        News(("1", "2"), (Progress(0, (5, 6), (2, 4), 1, scored=scored),)),
        News((), (Progress(1, (8,), (4,), 0),)),
        News(("3",), (Progress(0, (7,), (2,), 2, finished=True, usage=usage),)),
    ]
    given = given_by(pieces)
    assert given[0].characters == 3
    assert given[0].usage is usage
    (rest,) = rest_of(plan(), given, epoch=9, now=104.0)
    assert rest.resumed == (Resumed((5, 6, 7), (2, 4, 2), True), Resumed((8,), (4,)))
    assert rest.request_id == "chatcmpl-1.9"
    assert rest.timeout_s == pytest.approx(6.0)
    assert rest.sampling.prompt_logprobs is None
    (late,) = rest_of(plan(), {}, epoch=9, now=200.0)
    assert late.resumed == ()
    assert late.sampling.prompt_logprobs == 0
    assert 0 < (late.timeout_s or 0) < 0.1
