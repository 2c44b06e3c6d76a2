"""Token budgets on streams whose confidences are neither independent nor steady."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.checks import InvalidRequest
from fathom.exits.budget import QuantileTracker
from fathom.exits.histogram import ConfidenceHistogram

EXIT_COST = 0.4


def confidences(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Autocorrelated over about 20 tokens: easy and hard passages."""
    random = np.random.default_rng(seed)
    level, out = 0.0, np.empty(n)
    for i in range(n):
        level = 0.95 * level + 0.31 * random.normal()
        out[i] = 1 / (1 + np.exp(-(1.5 * level + shift + random.normal())))
    return out


def spend(tracker: QuantileTracker, rows: np.ndarray, budget: float, length: int) -> np.ndarray:
    """Mean cost of each request of ``length`` tokens."""
    costs = []
    for start in range(0, len(rows) - length + 1, length):
        exited = 0
        for decided, confidence in enumerate(rows[start : start + length]):
            threshold = tracker.threshold(budget, exited, decided)
            exited += bool(confidence > (0.9 if threshold is None else threshold))
            tracker.histogram.add_one(confidence)
            tracker.refresh()
        tracker.settle(budget, exited, length)
        costs.append(1 - exited / length * (1 - EXIT_COST))
    return np.array(costs)


@pytest.mark.parametrize("length", [10, 60])
@pytest.mark.parametrize("budget", [0.5, 0.7, 0.9])
def test_realised_budgets_follow_requested_ones_through_a_shift(budget, length) -> None:
    tracker = QuantileTracker(ConfidenceHistogram(half_life=1000), EXIT_COST)
    spend(tracker, confidences(600, 1), budget, length)
    before = spend(tracker, confidences(4000, 2), budget, length)
    after = spend(tracker, confidences(4000, 3, shift=2.0), budget, length)
    assert before.mean() == pytest.approx(budget, rel=0.02)
    assert after.mean() == pytest.approx(budget, rel=0.02)


def test_each_request_of_some_length_stays_near_its_own_budget() -> None:
    tracker = QuantileTracker(ConfidenceHistogram(half_life=1000), EXIT_COST)
    costs = spend(tracker, confidences(12_000, 4), 0.7, 100)
    assert np.abs(costs[5:] - 0.7).max() < 0.07


def test_budgets_side_by_side_are_met_each() -> None:
    tracker = QuantileTracker(ConfidenceHistogram(half_life=1000), EXIT_COST)
    costs: dict[float, list[float]] = {0.5: [], 0.85: []}
    for number in range(200):
        budget = (0.5, 0.85)[number % 2]
        costs[budget] += spend(tracker, confidences(30, number), budget, 30).tolist()
    for budget, found in costs.items():
        assert np.mean(found[5:]) == pytest.approx(budget, rel=0.02)


def test_rows_all_of_one_confidence_are_shared_out_too() -> None:
    tracker = QuantileTracker(ConfidenceHistogram(), EXIT_COST)
    costs = spend(tracker, np.ones(6000), 0.7, 50)
    # At confidence 1 nobody passes λ = 1 and everybody any smaller one.
    assert costs[3:].mean() == pytest.approx(0.7, rel=0.02)


def test_nothing_is_said_before_there_are_rows() -> None:
    tracker = QuantileTracker(ConfidenceHistogram(), EXIT_COST, least_rows=10)
    assert tracker.threshold(0.7) is None
    tracker.histogram.add(np.linspace(0, 1, 10))
    assert tracker.threshold(0.7) is not None
    with pytest.raises(InvalidRequest, match="budget"):
        tracker.threshold(0.3)


@given(st.floats(0.4, 1), st.integers(0, 300), st.integers(0, 300))
def test_thresholds_stay_in_range_and_fall_as_tokens_are_owed(budget, exited, more) -> None:
    tracker = QuantileTracker(ConfidenceHistogram(), EXIT_COST)
    tracker.histogram.add(np.linspace(0, 1, 500))
    decided = exited + more
    threshold = tracker.threshold(budget, exited, decided)
    assert threshold is not None
    assert -1 <= threshold <= 1
    if exited:
        fewer = tracker.threshold(budget, exited - 1, decided)
        assert fewer is not None
        assert fewer <= threshold


def test_a_full_budget_lets_nobody_go_and_the_smallest_everybody() -> None:
    tracker = QuantileTracker(ConfidenceHistogram(), EXIT_COST)
    tracker.histogram.add(np.linspace(0, 1, 500))
    assert tracker.threshold(1.0) == 1
    assert tracker.threshold(EXIT_COST) == -1


def test_debts_are_bounded_in_size_and_number() -> None:
    tracker = QuantileTracker(ConfidenceHistogram(), EXIT_COST)
    tracker.histogram.add(np.linspace(0, 1, 500))
    for _ in range(1000):
        tracker.settle(0.7, 0, 100)  # never exits, whatever the threshold
    owing = tracker.threshold(0.7)
    tracker.settle(0.7, 200, 200)  # and then it does
    tracker.settle(0.7, 0, 0)
    recovered = tracker.threshold(0.7)
    assert owing is not None
    assert recovered is not None
    assert recovered > owing
    for number in range(1000):
        tracker.settle(0.5 + number / 4001, 0, 100)
    # The budget of long ago is forgotten, with what it owed.
    tracker.settle(0.9, 0, 0)
    assert tracker.threshold(0.7) == QuantileTracker(tracker.histogram, EXIT_COST).threshold(0.7)


def test_a_share_of_next_to_nothing_has_a_threshold() -> None:
    """8 exits of 17 tokens leave 0.32 + (0.32 * 17 - 8) / 8 = 5.6e-17 for the next one."""
    tracker = QuantileTracker(ConfidenceHistogram(), 0.25, horizon=8)
    tracker.histogram.add(np.linspace(0, 1, 100))
    assert tracker.threshold(0.76, 8, 17) == pytest.approx(1, abs=0.01)
