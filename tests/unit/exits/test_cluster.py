"""Engines that share what they have seen: each knows as much as one that sees everything."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from fathom.compute import AcceptMode, ComputePolicy, PolicyName
from fathom.exits.cluster import SILENT_S, Board, merged
from fathom.exits.live import LivePolicies

ADAPTIVE = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE)
BUDGET = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.BUDGET, budget=0.6)
EXIT_COST = 0.4
Row = tuple[float, bool]


def traffic(rows: int, hard: float, seed: int) -> Iterator[Row]:
    """Rows of a workload of which the share ``hard`` is hard for the exit."""
    rng = np.random.default_rng(seed)
    for _ in range(rows):
        if rng.random() < hard:
            yield float(rng.beta(1.5, 3)), bool(rng.random() < 0.3)
        else:
            yield float(rng.beta(8, 1.2)), bool(rng.random() < 0.95)


def see(policies: LivePolicies, rows: Iterator[Row], count: int) -> None:
    for _, (confidence, agrees) in zip(range(count), rows, strict=False):
        policies.observe(ADAPTIVE, confidence, agrees)
        policies.threshold_for(ADAPTIVE, 0, 1)


def say(board: Board, name: str, policies: LivePolicies, now: float, group: str = "") -> None:
    # Through JSON: nothing but what can travel may matter.
    snapshot = json.loads(json.dumps(policies.snapshot()))
    policies.merge(board.exchange(name, group, snapshot, now))


def threshold(policies: LivePolicies, compute: ComputePolicy = ADAPTIVE) -> float:
    found = policies.threshold_for(compute, 0, 0)
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(3))
def test_two_halves_agree_with_one_that_sees_it_all(seed: int) -> None:
    """One half sees easy rows, the other hard ones; alone they would not agree."""
    board = Board()
    easy, hard, whole = (LivePolicies(EXIT_COST) for _ in range(3))
    streams = traffic(6000, 0.0, seed), traffic(6000, 0.9, seed + 100)
    again = traffic(6000, 0.0, seed), traffic(6000, 0.9, seed + 100)
    lone_easy = LivePolicies(EXIT_COST)
    see(lone_easy, traffic(6000, 0.0, seed), 3000)
    for now in range(150):
        see(easy, streams[0], 20)
        see(hard, streams[1], 20)
        for part in again * 2:
            see(whole, part, 10)
        say(board, "easy", easy, now)
        say(board, "hard", hard, now)
        say(board, "easy", easy, now)
    grid_step = 0.6 / 9  # of the thresholds that adaptive takes
    assert abs(threshold(easy) - threshold(hard)) <= 1e-9
    assert abs(threshold(easy) - threshold(whole)) <= grid_step + 1e-9
    for pair in ((easy, hard), (easy, whole)):
        budgets = [threshold(each, BUDGET) for each in pair]
        assert budgets[0] == pytest.approx(budgets[1], abs=0.06)
    assert threshold(lone_easy, BUDGET) > threshold(whole, BUDGET) + 0.05


def test_nobody_is_told_of_itself() -> None:
    board, one = Board(), LivePolicies(EXIT_COST)
    see(one, traffic(300, 0.5, 0), 300)
    before = threshold(one, BUDGET)
    for now in range(5):
        assert board.exchange("one", "", one.snapshot(), now) == []
        say(board, "one", one, now)
    assert threshold(one, BUDGET) == before


def test_who_went_away_ages_out_and_takes_its_rows_along() -> None:
    board = Board()
    one, gone = LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)
    see(one, traffic(300, 0.0, 0), 300)
    see(gone, traffic(300, 1.0, 1), 300)
    alone = threshold(one, BUDGET)
    say(board, "gone", gone, 0.0)
    say(board, "one", one, 0.0)
    assert threshold(one, BUDGET) < alone - 0.05
    say(board, "one", one, SILENT_S)
    assert len(board) == 2
    say(board, "one", one, SILENT_S + 1)
    assert len(board) == 1
    assert threshold(one, BUDGET) == pytest.approx(alone, abs=1e-6)


def test_who_sees_nothing_forgets_by_the_rows_of_the_others() -> None:
    """Then both agree on what the busy one sees; and a peer that is new has no new rows."""
    board = Board()
    busy, idle = LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)
    see(idle, traffic(300, 1.0, 1), 300)
    say(board, "idle", idle, 0)
    before = threshold(idle, BUDGET)
    veteran = LivePolicies(EXIT_COST)
    see(veteran, traffic(900, 1.0, 2), 900)
    say(board, "veteran", veteran, 0)
    say(board, "idle", idle, 0)
    assert threshold(idle, BUDGET) == pytest.approx(before, abs=0.1)
    totals = np.sum(idle.snapshot()["measures"]["softmax_gap"]["histogram"]["counts"])
    assert totals > 50
    lone = LivePolicies(EXIT_COST)
    rows, same = traffic(4000, 0.0, 0), traffic(4000, 0.0, 0)
    for now in range(60):
        see(busy, rows, 30)
        see(lone, same, 30)
        say(board, "idle", idle, now)
        say(board, "busy", busy, now)
    say(board, "idle", idle, 60)
    assert np.sum(idle.snapshot()["measures"]["softmax_gap"]["histogram"]["counts"]) < 0.01
    assert threshold(busy, BUDGET) == pytest.approx(threshold(lone, BUDGET), abs=0.01)
    assert threshold(idle, BUDGET) == pytest.approx(threshold(busy, BUDGET), abs=0.01)
    assert threshold(idle) == threshold(busy)


def test_busy_engines_keep_each_others_rows_however_seldom_they_talk() -> None:
    board = Board()
    one, other = LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)
    streams = traffic(5000, 0.0, 0), traffic(5000, 1.0, 1)
    for now in range(4):  # 1000 rows are far more than anybody remembers
        see(one, streams[0], 1000)
        see(other, streams[1], 1000)
        say(board, "one", one, now)
        say(board, "other", other, now)
    say(board, "one", one, 4)
    assert threshold(one, BUDGET) == pytest.approx(threshold(other, BUDGET), abs=1e-6)


def test_other_models_are_kept_apart() -> None:
    board = Board()
    old, new = LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)
    see(old, traffic(300, 1.0, 1), 300)
    say(board, "old", old, 0.0, group="a")
    assert board.exchange("new", "b", new.snapshot(), 0.0) == []
    assert len(board.exchange("third", "a", new.snapshot(), 0.0)) == 1


@pytest.mark.parametrize(
    "snapshot", [{}, {"measures": 3}, {"measures": {"softmax_gap": {"histogram": {"bins": 2}}}}]
)
def test_what_is_no_snapshot_is_refused(snapshot: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no snapshot|no histogram"):
        Board().exchange("one", "", snapshot, 0.0)


def test_the_merged_state_is_that_of_one_that_sees_everything() -> None:
    parts = [LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)]
    for seed, each in enumerate(parts):
        see(each, traffic(500, 0.3, seed), 500)
    found = merged([json.loads(json.dumps(each.snapshot())) for each in parts])
    assert found["engines"] == 2
    measure = found["measures"]["softmax_gap"]
    assert sum(measure["rows"].values()) == 1000
    assert measure["histogram"]["seen"] == 1000
    assert 0.3 <= measure["adaptive_threshold"] <= 0.9
    assert measure["mixture"]["fallback"] == ""
    rows = [seen for seen, _ in measure["history"]]
    assert rows == sorted(rows)
    json.dumps(found, allow_nan=False)
    assert merged([]) == {"engines": 0, "measures": {}, "promises": []}


def test_promises_are_added_up() -> None:
    risk = ComputePolicy(
        mode=AcceptMode.FREE, policy=PolicyName.RISK, risk=0.05, exit_threshold=0.8
    )
    parts = [LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)]
    for wrong, each in zip((0.0, 20.0), parts, strict=True):
        for _ in range(60):
            each.completed(risk, exited=10, decided=20, asked=20, wrong=wrong)
    (promise,) = merged([each.snapshot() for each in parts])["promises"]
    assert promise["completions"] == 120
    assert promise["observed"] == pytest.approx(0.5, abs=0.01)
    assert promise["alert"] is True
    assert (promise["risk"], promise["threshold"]) == (0.05, 0.8)


def test_states_of_the_largest_group_are_merged() -> None:
    states = []
    for group, rows in (("a", 100), ("b", 200), ("b", 300)):
        each = LivePolicies(EXIT_COST)
        see(each, traffic(rows, 0.3, rows), rows)
        states.append({"group": group, **each.snapshot()})
    found = merged(states)
    assert found["engines"] == 2
    assert sum(found["measures"]["softmax_gap"]["rows"].values()) == 500
