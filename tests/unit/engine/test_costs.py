"""Cost curves and the flush rule that follows from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.engine.costs import CostCurve, FlushRule, StageCosts

SHALLOW = CostCurve(((1, 0.010), (8, 0.011), (32, 0.018)))
DEEP = CostCurve(((1, 0.020), (8, 0.022), (32, 0.036)))


def rule(shallow: CostCurve = SHALLOW, deep: CostCurve = DEEP) -> FlushRule:
    return FlushRule(StageCosts(shallow=shallow, shallow_full=shallow, deep=deep))


def test_a_curve_passes_through_its_points_and_is_linear_between_and_beyond():
    assert DEEP(1) == 0.020
    assert DEEP(8) == 0.022
    assert DEEP(20) == pytest.approx(0.029)
    assert DEEP(56) == pytest.approx(0.050)
    assert DEEP(0) == 0.0


@given(st.integers(1, 60), st.integers(1, 60))
def test_more_rows_never_cost_less(a, b):
    low, high = sorted((a, b))
    assert DEEP(low) <= DEEP(high) + 1e-15


def test_measuring_never_yields_a_falling_curve():
    curve = CostCurve.measure(lambda rows: sum(range(20_000 // rows)), rows=(1, 2, 4, 8))
    seconds = list(curve.as_dict().values())
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_nothing_waiting_is_never_flushed_and_nothing_drafting_always_is():
    fresh = rule()
    assert not fresh.flush_now(waiting=0, drafting=5)
    assert fresh.flush_now(waiting=3, drafting=0)


def test_a_round_goes_on_while_many_draft_and_ends_when_few_do():
    crowd = rule()
    crowd.drafted(8)
    assert not crowd.flush_now(waiting=1, drafting=7)
    for rows in (7, 5, 3):
        crowd.drafted(rows)
    assert crowd.flush_now(waiting=7, drafting=1)


def test_cheap_flushes_are_made_at_once():
    cheap = rule(deep=CostCurve(((1, 0.0001), (8, 0.0008))))
    cheap.drafted(8)
    assert cheap.flush_now(waiting=4, drafting=4)
