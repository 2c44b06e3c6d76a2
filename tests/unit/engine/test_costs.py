"""Cost curves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.engine.costs import CostCurve

DEEP = CostCurve(((1, 0.020), (8, 0.022), (32, 0.036)))


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
