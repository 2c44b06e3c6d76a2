"""Counting requests: against a slow account, and what holds only for a time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.routing.loads import CHOSEN_FOR_S, REPORT_FOR_S, SILENT_AFTER_S, Loads

NAMES = ["a", "b", "c"]


class SlowLoads:
    """Every figure is computed anew from all that happened."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.chosen: dict[str, list[float]] = {}
        self.report: dict[str, tuple[int, float]] = {}
        self.avoid: dict[str, float] = {}
        self.silent_at: dict[str, float] = {}

    def update(self, names: set[str]) -> None:
        for kept in (self.running, self.chosen, self.report, self.avoid, self.silent_at):
            for name in set(kept) - names:
                del kept[name]
        for name in names:
            self.running.setdefault(name, 0)
            self.chosen.setdefault(name, [])

    def load(self, name: str, now: float) -> tuple[bool, int]:
        """Whether it is to be avoided, and its requests."""
        others, until = self.report.get(name, (0, 0.0))
        chosen = sum(until > now for until in self.chosen[name])
        total = self.running[name] + chosen + (others if until > now else 0)
        silent = self.silent_at.get(name, math.inf) <= now
        return silent or self.avoid.get(name, 0.0) > now, total


events = st.one_of(
    st.tuples(st.just("wait"), st.just(""), st.integers(1, 8)),
    st.tuples(
        st.sampled_from(["chosen", "started", "ended", "reported", "avoid"]),
        st.sampled_from(NAMES),
        st.integers(0, 6),
    ),
    st.tuples(st.just("update"), st.text("abc", min_size=1, max_size=3), st.just(0)),
)


@given(steps=st.lists(events, max_size=60))
def test_it_counts_what_a_slow_account_does(steps: list[tuple[str, str, int]]) -> None:
    loads, slow, now = Loads(), SlowLoads(), 100.0
    loads.update(NAMES)
    slow.update(set(NAMES))
    for event, name, number in steps:
        if event == "wait":
            now += number / 2
        elif event == "update":
            gone = loads.update(name)
            assert set(gone) == set(slow.running) - set(name)
            slow.update(set(name))
        elif event == "chosen":
            loads.chosen(name, now)
            if name in slow.running:
                slow.chosen[name].append(now + CHOSEN_FOR_S)
        elif event == "started":
            loads.started(name, now)
            if name in slow.running:
                slow.running[name] += 1
                slow.silent_at.setdefault(name, now + SILENT_AFTER_S)
                if slow.chosen[name]:
                    slow.chosen[name].pop(0)
        elif event == "ended":
            loads.ended(name)
            if name in slow.running:
                slow.silent_at.pop(name, None)
                slow.running[name] = max(0, slow.running[name] - 1)
        elif event == "reported":
            loads.reported(name, number, now)
            if name in slow.running:
                slow.silent_at.pop(name, None)
                others = max(0, number - slow.running[name])
                slow.report[name] = others, now + REPORT_FOR_S
        else:
            loads.avoid(name, now + number)
            if name in slow.running:
                slow.avoid[name] = now + number
        loads.expire(now)
        for chosen in slow.chosen.values():
            chosen[:] = [until for until in chosen if until > now]
        known = {each: slow.load(each, now) for each in slow.running}
        for each, (avoided, load) in known.items():
            assert loads.load(each) == load + (avoided and 1 << 30)
        assert known[loads.least()] == min(known.values())
        for each in known:
            others = [load for other, load in known.items() if other != each]
            if others:
                assert loads.least(each) != each
                assert known[loads.least(each)] == min(others)
        real = [load for avoided, load in known.values() if not avoided]
        assert loads.mean() == pytest.approx(sum(real) / len(real) if real else 0)


def test_of_equals_the_one_that_waited_longest_is_first() -> None:
    loads = Loads(seed=1)
    loads.update(NAMES)
    turns = []
    for _ in range(6):
        turns.append(loads.least())
        loads.started(turns[-1], 0.0)
        loads.ended(turns[-1])
    assert sorted(turns[:3]) == NAMES
    assert turns[:3] == turns[3:]


def test_without_replicas_there_is_no_least() -> None:
    with pytest.raises(LookupError):
        Loads().least()
    only = Loads()
    only.update(["a"])
    assert only.least(other_than="a") == "a"
