"""The monitor of a promise: rare false alarms for ever, and true ones soon."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.exits.risk import RiskMonitor

DELTA, ALPHA = 0.05, 0.05


def alarm_at(losses: np.ndarray, chance: float = 1.0) -> int | None:
    """Row of the alarm, if there is one."""
    monitor = RiskMonitor(DELTA, ALPHA)
    for row, loss in enumerate(losses):
        if monitor.observe(float(loss), chance):
            return row
    return None


@pytest.mark.parametrize("chance", [1.0, 0.1])
def test_a_promise_that_is_just_kept_is_seldom_called_broken(chance) -> None:
    random = np.random.default_rng(0)
    streams = 200
    # Wrong tokens at a rate of exactly δ, seen with this chance; watched at every row.
    wrong = random.random((streams, 2000)) < DELTA
    seen = random.random((streams, 2000)) < chance
    alarms = sum(alarm_at(row, chance) is not None for row in wrong & seen)
    assert alarms <= ALPHA * streams + 2 * math.sqrt(ALPHA * streams)


def test_request_losses_of_any_distribution_are_allowed() -> None:
    random = np.random.default_rng(1)
    losses = random.beta(0.5, 9.5, (200, 1500))  # mean 0.05
    assert sum(alarm_at(row) is not None for row in losses) <= 15


@pytest.mark.parametrize(("chance", "within"), [(1.0, 300), (0.1, 3000)])
def test_a_broken_promise_is_noticed(chance, within) -> None:
    random = np.random.default_rng(2)
    for _ in range(10):
        wrong = random.random(within) < 3 * DELTA
        assert alarm_at(wrong & (random.random(within) < chance), chance) is not None


def test_a_promise_that_breaks_late_is_noticed_too() -> None:
    random = np.random.default_rng(3)
    for _ in range(10):
        kept = random.random(5000) < DELTA / 2
        broken = random.random(1000) < 4 * DELTA
        found = alarm_at(np.concatenate([kept, broken]))
        assert found is not None
        assert 5000 <= found < 5500


def test_an_alarm_stays() -> None:
    monitor = RiskMonitor(DELTA, ALPHA)
    while not monitor.observe(1.0):
        assert monitor.rows < 100
    for _ in range(2000):
        monitor.observe(0.0)
    assert monitor.alert
    assert monitor.evidence < 1
    assert monitor.risk < 0.1


@given(st.lists(st.sampled_from([0.0, 0.2, 1.0]), max_size=60), st.floats(0.05, 1))
@settings(deadline=None)
def test_wealth_is_the_mixture_over_stakes_and_starts(losses, chance) -> None:
    monitor = RiskMonitor(DELTA, ALPHA)
    for loss in losses:
        monitor.observe(loss, chance)
    stakes = np.geomspace(1e-4, 0.5, 12) / DELTA
    x = np.array(losses) / chance
    expected = 1 / (len(x) + 1)  # not staked yet
    for start in range(len(x)):
        factors = 1 + stakes[:, None] * (x[start:] - DELTA)
        expected += factors.prod(axis=1).mean() / ((start + 1) * (start + 2))
    assert monitor.evidence == pytest.approx(expected)
    assert monitor.evidence >= 0


def test_the_mean_loss_is_shown_and_what_is_no_number_is_left_out() -> None:
    monitor = RiskMonitor(0.5, memory=1e9)
    for loss in (0.0, 1.0, math.nan, 0.0, 1.0):
        monitor.observe(loss)
    assert monitor.rows == 4
    assert monitor.risk == pytest.approx(0.5)


@pytest.mark.parametrize(("delta", "alpha", "names"), [(0, 0.1, "delta"), (0.1, 1, "alpha")])
def test_settings_out_of_range_are_refused(delta, alpha, names) -> None:
    with pytest.raises(ValueError, match=names):
        RiskMonitor(delta, alpha)
