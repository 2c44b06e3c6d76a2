"""Costs that follow the passes of an engine."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.engine.costs import CostCurve, StageCosts
from fathom.engine.drafting import DraftRule
from fathom.engine.live_costs import LiveCosts

MEASURED = StageCosts(
    shallow=CostCurve(((1, 4.0), (8, 6.0), (32, 15.0))),
    shallow_full=CostCurve(((1, 2.0), (8, 3.0), (32, 9.0))),
    deep=CostCurve(((1, 12.0), (8, 20.0), (32, 50.0))),
)


def names() -> st.SearchStrategy[str]:
    return st.sampled_from(("shallow", "shallow_full", "deep"))


def test_they_begin_as_measured() -> None:
    costs = LiveCosts(MEASURED)
    for rows in (0, 1, 5, 8, 20, 40):
        assert costs.deep(rows) == MEASURED.deep(rows)
    assert costs.drift == 1


@given(factor=st.floats(0.3, 4), seen=st.sampled_from((1, 3, 8, 20, 32)))
def test_a_slower_machine_is_learned(factor: float, seen: int) -> None:
    costs = LiveCosts(MEASURED)
    for _ in range(150):
        costs.shallow_full.observe(seen, factor * MEASURED.shallow_full(seen))
        costs.deep.observe(seen, factor * MEASURED.deep(seen))
    assert costs.deep(seen) == pytest.approx(factor * MEASURED.deep(seen), rel=0.02)
    # What was not run meanwhile (drafts, in a pause) is taken to have changed as well, in part.
    share = (
        math.log(costs.shallow(1) / MEASURED.shallow(1)) / math.log(factor) if factor != 1 else 1
    )
    assert 0.3 < share <= 1.01


@given(name=names(), rows=st.integers(1, 32), seconds=st.floats(1e-6, 1e9))
def test_one_pass_moves_little(name: str, rows: int, seconds: float) -> None:
    costs = LiveCosts(MEASURED)
    getattr(costs, name).observe(rows, seconds)
    moved = getattr(costs, name)(rows) / getattr(MEASURED, name)(rows)
    assert 0.95 < moved < 1.05


@given(
    passes=st.lists(st.tuples(names(), st.integers(1, 32), st.floats(1e-3, 1e3)), max_size=300),
    asked=st.integers(1, 64),
)
def test_costs_stay_positive_and_finite(passes: list[tuple[str, int, float]], asked: int) -> None:
    costs = LiveCosts(MEASURED)
    for name, rows, seconds in passes:
        getattr(costs, name).observe(rows, seconds)
    for name in ("shallow", "shallow_full", "deep"):
        assert 0 < getattr(costs, name)(asked) < math.inf


def test_one_row_count_may_change_alone() -> None:
    """Wide deep passes got slow, say, for long contexts: the others' costs come back to theirs."""
    costs = LiveCosts(MEASURED)
    for _ in range(600):
        costs.deep.observe(8, 3 * MEASURED.deep(8))
        costs.deep.observe(1, MEASURED.deep(1))
        costs.shallow.observe(1, MEASURED.shallow(1))
    assert costs.deep(8) == pytest.approx(3 * MEASURED.deep(8), rel=0.1)
    assert costs.deep(1) == pytest.approx(MEASURED.deep(1), rel=0.1)
    assert costs.shallow(1) == pytest.approx(MEASURED.shallow(1), rel=0.1)


def test_the_draft_rule_changes_its_mind_with_them() -> None:
    costs = LiveCosts(MEASURED)
    rule = DraftRule(costs)
    for index in range(200):
        rule.decided(exited=index % 3 > 0)
        rule.judged(agreed=True)
    assert not rule.pause(1)
    for _ in range(400):  # drafts take four times as long as the start said
        costs.shallow.observe(1, 4 * MEASURED.shallow(1))
        costs.deep.observe(1, MEASURED.deep(1))
        costs.deep.observe(4, MEASURED.deep(4))
    for index in range(30):
        rule.decided(exited=index % 3 > 0)
    assert rule.pause(1)
