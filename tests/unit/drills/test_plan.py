"""A drill's kills are decided by its seed, and hit only what a pool can spare."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from fathom.bench.prompts import QUESTIONS
from fathom.drills.killer import Killer
from fathom.drills.plan import Blow, blows
from fathom.drills.workload import MODES, distinct_requests, pick
from tests.unit.drills.conftest import Pool

KINDS = ("ingress", "shallow", "deep", "directory")


def first(seed: int, count: int = 40) -> list[Blow]:
    return list(itertools.islice(blows(seed, KINDS, 4.0), count))


def test_the_plan_is_a_function_of_the_seed() -> None:
    assert first(7) == first(7)
    assert first(7) != first(8)


def test_every_kind_comes_in_every_round_and_times_stay_near_the_mean() -> None:
    plan = first(3)
    for start in range(0, len(plan), len(KINDS)):
        assert {blow.kind for blow in plan[start : start + len(KINDS)]} == set(KINDS)
    assert all(2.0 <= blow.after_s <= 6.0 for blow in plan)
    assert len({tuple(b.kind for b in plan[i : i + 4]) for i in range(0, 40, 4)}) > 1


def test_the_victim_does_not_depend_on_the_order_of_names() -> None:
    blow = Blow(1.0, "deep", 0.7)
    assert blow.choose(["b", "a", "c"]) == blow.choose(["c", "b", "a"]) == "c"
    assert Blow(1.0, "deep", 0.0).choose(["b", "a"]) == "a"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_last_of_a_kind_is_spared_until_it_has_recovered(pool: Pool) -> None:
    killer = Killer(pool, iter([Blow(0.0, "deep", 0.0), Blow(0.0, "deep", 0.9)]))
    killer.start()
    until(lambda: len(pool.ready("deep")) == 1 and len(killer.kills) == 1)
    time.sleep(0.5)
    assert len(pool.ready("deep")) == 1
    pool.mend()
    until(lambda: len(killer.kills) == 2)
    killer.stop()
    assert killer.kills[0].waited_s < killer.kills[1].waited_s
    assert killer.kills[1].waited_s >= 0.5
    assert killer.kills[1].as_dict()["pid"] == killer.kills[1].pid > 0
    assert killer.error == ""


def test_nothing_dies_after_stop(pool: Pool) -> None:
    killer = Killer(pool, iter([Blow(0.2, "deep", 0.0)]))
    killer.start()
    killer.stop()
    time.sleep(0.4)
    assert len(pool.ready("deep")) == 2
    assert killer.kills == []


def test_requests_are_of_every_mode_and_partly_behind_one_prefix() -> None:
    bodies = distinct_requests("model", MODES, 16)
    assert len(bodies) == 4 * len(QUESTIONS)
    assert {body["compute"]["mode"] for body in pick(bodies, 12)} == {m.value for m in MODES}
    assert len(pick(bodies, 12)) == 4
    assert len(pick(bodies, 200)) == 25
    some = pick(bodies, 200)
    prefixes = {body["messages"][0]["content"] for body in some if len(body["messages"]) == 2}
    assert len(prefixes) == 1
    assert any("logprobs" in body for body in some)
    assert any("logprobs" not in body for body in some)
    assert any(body.get("n") == 2 for body in some)
