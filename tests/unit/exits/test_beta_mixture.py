"""The two fits of the beta mixture, against the official formulas, scipy and the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fathom.exits.beta_mixture import (
    GRID,
    START,
    Beta,
    BetaMixture,
    fit_em,
    fit_moments,
)
from fathom.exits.histogram import ConfidenceHistogram

BINS = 4096
"""Fine enough for the bins' width to drop out of comparisons with exact formulas."""


def rows_of(n: int, share: float, agree, disagree, seed: int = 0):  # type: ignore[no-untyped-def]
    random = np.random.default_rng(seed)
    agrees = random.random(n) < share
    confidence = np.where(agrees, random.beta(*agree, n), random.beta(*disagree, n))
    return confidence, agrees


def seen(confidence, agrees, bins: int = BINS) -> ConfidenceHistogram:  # type: ignore[no-untyped-def]
    histogram = ConfidenceHistogram(bins)
    histogram.add(confidence, agrees)
    return histogram


def official_threshold(x: np.ndarray, y: np.ndarray) -> tuple[list[float], float]:
    """What util/bmm.py of the authors does with labels, written down anew from its arithmetic."""
    x = np.clip(x, 1e-4, 1 - 1e-4)
    responsibility = np.maximum(0.2 * np.stack([~y, y]).astype(float), 1e-4)
    responsibility /= responsibility.sum(axis=0)
    parts = []
    for r in responsibility:
        m = (r * x).sum() / r.sum()
        s2 = (r * (x - m) ** 2).sum() / r.sum()
        alpha = m * (m * (1 - m) / s2 - 1)
        parts.append((alpha, alpha * (1 - m) / m))
    grid = np.linspace(0.3, 0.9, 10)
    means = [a / (a + b) for a, b in parts]
    high = int(np.argmax(means))
    f_high, f_low = (stats.beta.pdf(grid, *parts[k]) for k in (high, 1 - high))
    passing = int((f_high / (f_high + f_low) > 0.4).sum())
    return [v for p in parts for v in p], float(grid[min(max(0, 10 - passing), 9)])


@given(
    n=st.integers(30, 400),
    share=st.floats(0.2, 0.95),
    high=st.tuples(st.floats(1, 9), st.floats(0.5, 3)),
    low=st.tuples(st.floats(0.5, 3), st.floats(1, 5)),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_moments_are_those_of_the_official_code(n, share, high, low, seed) -> None:
    x, y = rows_of(n, share, high, low, seed)
    mixture = fit_moments(seen(x, y))
    expected, threshold = official_threshold(x, y)
    found = [mixture.disagrees.alpha, mixture.disagrees.beta]
    found += [mixture.agrees.alpha, mixture.agrees.beta]
    np.testing.assert_allclose(found, expected, rtol=0.02)
    # Where a value of the grid is a tie, a bin's width may decide.
    ratio = mixture.posterior(GRID)
    if np.abs(np.maximum(ratio, 1 - ratio) - 0.6).min() > 0.01:
        assert mixture.threshold() == pytest.approx(threshold)


def test_with_agreement_alone_moments_fall_to_the_floor_as_the_official_code_does() -> None:
    x = np.random.default_rng(0).beta(20, 1, 300)
    y = np.ones(300, dtype=bool)
    assert official_threshold(x, y)[1] == pytest.approx(0.3)
    assert fit_moments(seen(x, y)).threshold() == pytest.approx(0.3)
    # EM, whose prior holds that other rows may come, does not trust confidences that nobody had.
    assert fit_em(seen(x, y)).threshold() > 0.4


@given(
    alpha=st.floats(0.3, 30),
    beta=st.floats(0.3, 30),
    x=st.lists(st.floats(0.001, 0.999), min_size=1),
)
def test_densities_are_scipys(alpha, beta, x) -> None:
    np.testing.assert_allclose(
        Beta(alpha, beta).log_density(x), stats.beta.logpdf(x, alpha, beta), rtol=1e-7, atol=1e-7
    )
    assert Beta(alpha, beta).mean == pytest.approx(stats.beta.mean(alpha, beta))


def test_with_all_labels_em_is_maximum_likelihood() -> None:
    x, y = rows_of(3000, 0.7, (5, 1.2), (1.5, 3))
    mixture = fit_em(seen(x, y))
    for part, rows in ((mixture.agrees, x[y]), (mixture.disagrees, x[~y])):
        alpha, beta, _, _ = stats.beta.fit(rows, floc=0, fscale=1)
        assert part.alpha == pytest.approx(alpha, rel=0.02)
        assert part.beta == pytest.approx(beta, rel=0.02)
    assert mixture.weight == pytest.approx(y.mean(), abs=0.001)
    expected = stats.beta.logpdf(x[y], mixture.agrees.alpha, mixture.agrees.beta).sum()
    expected += stats.beta.logpdf(x[~y], mixture.disagrees.alpha, mixture.disagrees.beta).sum()
    expected += y.sum() * np.log(mixture.weight) + (~y).sum() * np.log(1 - mixture.weight)
    assert mixture.log_likelihood == pytest.approx(expected, rel=0.01, abs=5)


def test_with_latent_labels_em_finds_what_a_general_optimizer_finds() -> None:
    x, y = rows_of(2000, 0.6, (6, 1.5), (2, 3), seed=3)
    labelled = (x < 0.5) | (np.random.default_rng(1).random(2000) < 0.05)
    histogram = ConfidenceHistogram(BINS)
    histogram.add(x[labelled], y[labelled])
    histogram.add(x[~labelled])
    mixture = fit_em(histogram, tolerance=1e-10, most_iterations=2000)

    def loss(p: np.ndarray) -> float:
        (a1, b1, a0, b0), w = np.exp(p[:4]), 1 / (1 + np.exp(-p[4]))
        high = np.log(w) + stats.beta.logpdf(x, a1, b1)
        low = np.log(1 - w) + stats.beta.logpdf(x, a0, b0)
        told = np.where(y, high, low)[labelled].sum()
        prior = -(a1 + b1 + a0 + b0 - 4) + np.log(w) + np.log(1 - w)
        prior += stats.beta.logpdf(0.5, a1, b1) - (a1 + b1 - 2) * np.log(0.5)
        prior += stats.beta.logpdf(0.5, a0, b0) - (a0 + b0 - 2) * np.log(0.5)
        return float(-(told + np.logaddexp(high, low)[~labelled].sum() + prior))

    best = optimize.minimize(loss, [1, 0, 0.5, 0.5, 0], method="L-BFGS-B")
    found = [mixture.agrees.alpha, mixture.agrees.beta]
    found += [mixture.disagrees.alpha, mixture.disagrees.beta]
    np.testing.assert_allclose(found, np.exp(best.x[:4]), rtol=0.02)
    assert mixture.weight == pytest.approx(1 / (1 + np.exp(-best.x[4])), abs=0.005)


@given(share=st.floats(0.2, 0.9), rate=st.floats(0.02, 0.5), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_no_iteration_of_em_loses_likelihood(share, rate, seed) -> None:
    x, y = rows_of(600, share, (4, 1), (1.5, 2), seed)
    labelled = (x < 0.4) | (np.random.default_rng(seed).random(600) < rate)
    histogram = ConfidenceHistogram()
    histogram.add(x[labelled], y[labelled])
    histogram.add(x[~labelled])
    reached = [
        fit_em(histogram, tolerance=0, most_iterations=steps).log_likelihood
        for steps in (1, 2, 4, 8, 16, 64)
    ]
    # It climbs the penalized likelihood: the prior of one made-up row a class may give a little.
    assert (np.diff(reached) > -1.0).all()
    assert reached[-1] >= reached[0] - 1e-6


def test_a_start_nearby_saves_iterations_and_ends_at_the_same_place() -> None:
    x, y = rows_of(4000, 0.7, (5, 1), (1.5, 3))
    labelled = x < 0.5
    labelled |= np.random.default_rng(0).random(4000) < 0.02
    histogram = ConfidenceHistogram()
    histogram.add(x[labelled], y[labelled])
    histogram.add(x[~labelled])
    cold = fit_em(histogram, tolerance=1e-9)
    warm = fit_em(histogram, cold, tolerance=1e-9)
    assert warm.iterations < cold.iterations / 2
    assert warm.agrees.alpha == pytest.approx(cold.agrees.alpha, rel=0.01)
    assert warm.weight == pytest.approx(cold.weight, abs=0.005)


@pytest.mark.parametrize("fit", [fit_moments, fit_em])
@pytest.mark.parametrize(
    ("confidence", "agrees"),
    [
        ([], []),
        ([0.5] * 50, [True] * 50),
        ([0.5] * 50, [False] * 50),
        ([0.5] * 50, [True, False] * 25),
        ([0.0, 1.0] * 25, [False, True] * 25),
        ([0.0, 1.0] * 25, [True, False] * 25),
        ([1.0] * 50, [True] * 50),
        ([0.0] * 50, [False] * 50),
        ([float("nan")] * 50, [True] * 50),
        (np.linspace(0, 1, 50), [False] * 50),
        (np.linspace(0, 1, 50), [True] * 50),
    ],
)
def test_no_data_however_odd_breaks_a_fit(fit, confidence, agrees) -> None:
    mixture = fit(seen(confidence, agrees, bins=256))
    for part in (mixture.agrees, mixture.disagrees):
        assert 0 < part.alpha < np.inf
        assert 0 < part.beta < np.inf
    assert 0 < mixture.weight < 1
    assert np.isfinite(mixture.posterior([0.0, 0.3, 1.0])).all()
    assert 0 <= mixture.threshold() <= 1
    if mixture.fallback:
        assert mixture.threshold() == START


def test_a_fallback_says_why() -> None:
    few = fit_em(seen([0.2, 0.9], [False, True]))
    assert "2.0 rows" in few.fallback
    assert few.threshold(start=0.77) == 0.77
    x, y = rows_of(500, 0.5, (1, 5), (5, 1))
    assert "confident" in fit_em(seen(x, y)).fallback


def test_the_threshold_is_where_the_posterior_stays_above_zeta() -> None:
    # The density of agreement is bimodal relative to the other one: high at both ends.
    mixture = BetaMixture(Beta(8, 8), Beta(1.0, 0.9), 0.5, "em", (1, 1, 0), 0.0, 1)
    chance = mixture.posterior(GRID)
    threshold = mixture.threshold()
    assert chance[0] > 0.4  # passes at the low end, but not from there on
    assert threshold > GRID[0]
    assert (chance[threshold - 1e-9 <= GRID] > 0.4).all()
    assert chance[threshold - 1e-9 > GRID][-1] <= 0.4
    assert mixture.threshold(zeta=1.0) == GRID[-1]
