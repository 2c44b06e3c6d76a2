"""Temperatures and reliability, against logits in full and counting by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from fathom.exits.calibration import (
    TEMPERATURES,
    fit_temperature,
    probability_at,
    reliability,
)


def traced(n: int, true_temperature: float, seed: int = 0):  # type: ignore[no-untyped-def]
    """Logits of which the deep choice is drawn at some temperature."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (n, 40))
    p = softmax(logits / true_temperature, axis=1)
    choice = (p.cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    lse = np.stack([logsumexp(logits / t, axis=1) for t in TEMPERATURES], axis=1)
    return logits, choice, lse


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 1.3, 2.6])
def test_the_temperature_is_that_of_the_full_logits(true_temperature) -> None:
    logits, choice, lse = traced(3000, true_temperature)
    rows = np.arange(len(choice))

    def loss(t: float) -> float:
        return float(-log_softmax(logits / t, axis=1)[rows, choice].mean())

    best = minimize_scalar(loss, bounds=(0.25, 4), method="bounded")
    fitted = fit_temperature(logits[rows, choice], lse)
    assert fitted.temperature == pytest.approx(best.x, rel=0.01)
    assert fitted.temperature == pytest.approx(true_temperature, rel=0.08)
    assert fitted.loss == pytest.approx(best.fun, abs=1e-3)
    assert fitted.before == pytest.approx(loss(1.0), abs=1e-3)
    assert fitted.loss <= fitted.before + 1e-9
    assert (fitted.rows, fitted.unscored) == (3000, 0)


def test_rows_that_cannot_be_scored_are_left_out_and_counted() -> None:
    logits, choice, lse = traced(500, 1.5)
    target = logits[np.arange(500), choice]
    whole = fit_temperature(target, lse)
    target = np.append(target, [-math.inf, -math.inf, math.nan])
    lse = np.concatenate([lse, lse[:2], np.full((1, 16), math.nan)])
    part = fit_temperature(target, lse)
    assert part.temperature == whole.temperature
    assert (part.rows, part.unscored) == (500, 2)
    with pytest.raises(ValueError, match="no row"):
        fit_temperature([-math.inf], lse[:1])
    with pytest.raises(ValueError, match="16"):
        fit_temperature(target, lse[:, :3])


@pytest.mark.parametrize("temperature", [*TEMPERATURES[::5], 1.0, 1.7])
def test_confidences_at_a_temperature_are_those_of_the_full_logits(temperature) -> None:
    logits, _, lse = traced(200, 1.0)
    ordered = np.sort(logits, axis=1)
    p = np.sort(softmax(logits / temperature, axis=1), axis=1)
    best = probability_at(ordered[:, -1], lse, temperature)
    second = probability_at(ordered[:, -2], lse, temperature)
    np.testing.assert_allclose(best, p[:, -1], atol=2e-3)
    np.testing.assert_allclose(best - second, p[:, -1] - p[:, -2], atol=2e-3)
    if temperature in TEMPERATURES:
        np.testing.assert_allclose(best, p[:, -1], rtol=1e-9)


def test_rows_that_are_not_finite_have_no_probability() -> None:
    _, _, lse = traced(2, 1.0)
    lse[0, 3] = math.nan
    found = probability_at([1.0, -math.inf], lse, 1.0)
    assert math.isnan(found[0])
    assert found[1] == 0
    assert np.isnan(probability_at([1.0], np.full((1, 16), math.nan), 1.0)).all()
    with pytest.raises(ValueError, match="temperature"):
        probability_at([1.0, 1.0], lse, 5.0)


@given(
    rows=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50),
    bins=st.integers(1, 20),
)
def test_the_calibration_error_is_counted_bin_by_bin(rows, bins) -> None:
    found = reliability([c for c, _ in rows], [y for _, y in rows], bins=bins)
    ends = np.linspace(0, 1, bins + 1)
    error, largest = 0.0, 0.0
    for place, (low, high) in enumerate(itertools.pairwise(ends)):
        own = [(c, y) for c, y in rows if low < c <= high or (place == 0 and c == 0)]
        assert found.count[place] == len(own)
        if own:
            confidence, accuracy = np.mean(own, axis=0)
            assert found.confidence[place] == pytest.approx(confidence)
            assert found.accuracy[place] == pytest.approx(accuracy)
            error += len(own) / len(rows) * abs(confidence - accuracy)
            largest = max(largest, abs(confidence - accuracy))
        else:
            assert math.isnan(found.accuracy[place])
    assert found.ece == pytest.approx(error)
    assert found.mce == pytest.approx(largest)


def test_calibrated_rows_have_no_error_and_overconfident_ones_have() -> None:
    random = np.random.default_rng(0)
    c = random.beta(5, 1, 100_000)
    right = random.random(len(c)) < c
    assert reliability(c, right).ece < 0.01
    assert abs(reliability(c, right).overconfidence) < 0.01
    wrong = reliability(c, random.random(len(c)) < c - 0.1)
    assert wrong.overconfidence == pytest.approx(0.1, abs=0.01)
    assert wrong.ece == pytest.approx(0.1, abs=0.01)


@given(st.lists(st.sampled_from([0.0, 0.3, 0.31, 0.9, 1.0]), min_size=1, max_size=40))
def test_bins_of_equal_mass_hold_every_row_once(confidences) -> None:
    agrees = [c > 0.3 for c in confidences]
    found = reliability(confidences, agrees, bins=5, equal_mass=True)
    assert found.count.sum() == len(confidences)
    assert (np.diff(found.edges) > 0).all()
    assert -1e-9 < found.ece < found.mce + 1e-9 < 1 + 2e-9


def test_bins_of_equal_mass_are_even_where_rows_differ() -> None:
    c = np.random.default_rng(0).beta(9, 1, 1000)
    found = reliability(c, np.ones(1000, dtype=bool), bins=10, equal_mass=True)
    assert found.count.tolist() == [100] * 10


def test_what_cannot_be_judged_is_refused() -> None:
    assert reliability([math.nan, 0.5], [True, True]).count.sum() == 1
    with pytest.raises(ValueError, match="no row"):
        reliability([math.nan], [True])
    with pytest.raises(ValueError, match="rows"):
        reliability([0.5], [True, False])
    with pytest.raises(ValueError, match="bins"):
        reliability([0.5], [True], bins=0)
