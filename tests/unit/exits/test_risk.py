"""Promises about risk: p-values against exact computation, the guarantee by Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fathom.exits import risk
from fathom.exits.p_values import Bound, betting, divergence, hoeffding_bentkus
from fathom.exits.risk import TooLittleData, Unit, certify, certify_losses, losses

DELTA, EPSILON = 0.1, 0.1


def trace(requests: int, random: np.random.Generator, tokens: int = 30):  # type: ignore[no-untyped-def]
    """Requests of different difficulty: rows of one resemble each other."""
    n = requests * tokens
    groups = np.repeat(np.arange(requests), tokens)
    hard = np.repeat(random.normal(0, 1, requests), tokens)
    confidence = 1 / (1 + np.exp(-(1.5 - hard + random.normal(0, 1.2, n))))
    agrees = random.random(n) < confidence
    return confidence, agrees, groups


@pytest.mark.parametrize("n", [1, 5, 40, 300])
@pytest.mark.parametrize("delta", [0.02, 0.1, 0.5])
def test_p_values_are_valid_for_losses_of_0_and_1(n, delta) -> None:
    # Exactly, over all outcomes of a binomial at the edge of the hypothesis: P(p <= u) <= u.
    outcomes = np.arange(n + 1)
    chance = binom.pmf(outcomes, n, delta)
    table = np.tril(np.ones((n + 1, n)), -1).T  # column k: k losses of 1
    for p in (hoeffding_bentkus(outcomes / n, n, delta), betting(table, delta)):
        assert (np.diff(p) >= -1e-12).all()  # more losses, less evidence
        for level in (0.01, 0.05, 0.1, 0.3):
            assert chance[p <= level].sum() <= level + 1e-12


@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_p_values_are_valid_for_losses_in_between(spread) -> None:
    random = np.random.default_rng(0)
    a = 0.1 / spread  # a beta distribution of mean 0.1, narrow or wide
    draws = random.beta(a, 9 * a, (100, 4000))
    for p in (hoeffding_bentkus(draws.mean(axis=0), 100, 0.1), betting(draws, 0.1)):
        for level in (0.05, 0.1):
            assert (p <= level).mean() <= level + 3 * math.sqrt(level / 4000)


def test_the_formula_of_hoeffding_and_bentkus() -> None:
    # By hand: 3 losses of 50 at δ = 0.2.
    kl = 0.06 * math.log(0.06 / 0.2) + 0.94 * math.log(0.94 / 0.8)
    expected = min(math.exp(-50 * kl), math.e * binom.cdf(3, 50, 0.2))
    assert float(hoeffding_bentkus(0.06, 50, 0.2)) == pytest.approx(expected)
    assert float(divergence(0.06, 0.2)) == pytest.approx(kl)
    assert hoeffding_bentkus([0.2, 0.5, 1.0], 50, 0.2).tolist() == [1, 1, 1]
    assert float(hoeffding_bentkus(0.0, 50, 0.2)) == pytest.approx(0.8**50)


def test_betting_sees_that_losses_vary_little() -> None:
    losses_seen = np.full(200, 0.05)
    assert float(betting(losses_seen, 0.1)) < 0.01 < float(hoeffding_bentkus(0.05, 200, 0.1))


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0, math.nan]), st.booleans(), st.integers(0, 3)
        ),
        min_size=1,
        max_size=30,
    )
)
def test_losses_are_counted_as_the_policy_exits(rows) -> None:
    grid = np.array([0.95, 0.9, 0.5, 0.1, 0.0])
    confidence, agrees, groups = (np.array(column) for column in zip(*rows, strict=True))
    table = losses(confidence, agrees, groups, grid=grid)
    for unit, name in enumerate(np.unique(groups)):
        own = groups == name
        assert table.rows[unit] == own.sum()
        for place, threshold in enumerate(grid):
            out = own & (confidence > threshold)
            assert table.exits[unit, place] == out.sum()
            assert table.wrong[unit, place] == (out & ~agrees.astype(bool)).sum()
    single = losses(confidence, agrees, grid=grid, unit=Unit.TOKEN)
    assert len(single.rows) == len(rows)
    np.testing.assert_array_equal(single.wrong.sum(axis=0), table.wrong.sum(axis=0))


@pytest.mark.parametrize("bound", list(Bound))
def test_the_promise_is_broken_in_at_most_epsilon_of_splits(bound) -> None:
    random = np.random.default_rng(1)
    # The truth: what a great many requests lose at each threshold.
    truth = losses(*trace(20_000, random))
    risks = (truth.wrong / truth.rows[:, None]).mean(axis=0)
    splits, broken, coverage = 300, 0, []
    for _ in range(splits):
        certificate = certify(*trace(150, random), DELTA, EPSILON, bound=bound)
        coverage.append(certificate.coverage)
        if certificate.coverage:
            broken += risks[truth.grid == certificate.threshold][0] > DELTA
    # A rate of exactly ε is exceeded by this much once in 100 times.
    assert broken <= binom.ppf(0.99, splits, EPSILON)
    assert np.mean(coverage) > 0.1


def test_a_test_without_the_correction_would_break_it() -> None:
    # The check above can fail: thresholds at which the observed risk is just δ break the promise.
    random = np.random.default_rng(2)
    truth = losses(*trace(20_000, random))
    risks = (truth.wrong / truth.rows[:, None]).mean(axis=0)
    broken = 0
    for _ in range(100):
        threshold, _ = risk.oracle_threshold(*trace(150, random), DELTA)
        broken += risks[truth.grid == threshold][0] > DELTA
    assert broken > 25


def test_a_certificate_says_what_it_rests_on() -> None:
    rows = trace(400, np.random.default_rng(3))
    certificate = certify(*rows, DELTA, EPSILON)
    confidence, agrees, groups = rows
    out = confidence > certificate.threshold
    assert certificate.coverage == pytest.approx(out.mean())
    each = [(out & ~agrees)[groups == g].mean() for g in range(400)]
    assert certificate.risk_hat == pytest.approx(np.mean(each))
    assert certificate.n == 400
    assert certificate.p_values[-2] <= EPSILON < certificate.p_values[-1]
    assert max(certificate.p_values[:-1]) <= EPSILON
    oracle, share = risk.oracle_threshold(*rows, DELTA)
    assert oracle <= certificate.threshold
    assert share >= certificate.coverage
    # A tighter bound gives more away, on the same data.
    assert certify(*rows, DELTA, EPSILON, bound=Bound.BETTING).coverage > certificate.coverage


def test_stored_losses_certify_any_promise() -> None:
    rows = trace(400, np.random.default_rng(4))
    table = losses(*rows)
    thresholds = []
    for delta in (0.05, 0.1, 0.2):
        assert certify_losses(table, delta, 0.1) == certify(*rows, delta, 0.1)
        thresholds.append(certify_losses(table, delta, 0.1).threshold)
    assert thresholds == sorted(thresholds, reverse=True)
    assert certify_losses(table, 0.1, 0.01).threshold >= thresholds[1]


@pytest.mark.parametrize("delta", [0.02, 0.05])
def test_too_little_data_is_refused_and_what_it_names_would_do(delta) -> None:
    few = trace(10, np.random.default_rng(5))
    confidence, _, groups = few
    right = np.ones(len(confidence), dtype=bool)
    with pytest.raises(TooLittleData, match=r"10 requests \(300 rows\)") as caught:
        certify(confidence, right, groups, delta, EPSILON)
    error = caught.value
    assert (error.have, error.param) == (10, "risk")
    assert f"about {error.need} requests" in str(error)
    # (1 - δ)^n <= ε is what flawless requests need.
    assert error.need == math.ceil(math.log(EPSILON) / math.log(1 - delta))
    for count, does in ((error.need, True), (error.need - 1, False)):
        table = (np.full(count, 0.95), np.ones(count, dtype=bool), np.arange(count))
        if does:
            assert certify(*table, delta, EPSILON).coverage == 1
        else:
            with pytest.raises(TooLittleData):
                certify(*table, delta, EPSILON)


def test_no_data_at_all_is_too_little() -> None:
    with pytest.raises(TooLittleData, match="0 requests"):
        certify([], [], [], 0.1)


def test_where_even_the_surest_rows_are_wrong_nobody_may_leave() -> None:
    certificate = certify(np.ones(100), np.zeros(100, dtype=bool), np.arange(100), 0.1)
    assert certificate.threshold == 1
    assert (certificate.coverage, certificate.risk_hat) == (0, 0)


def test_rows_without_a_confidence_never_leave_but_count() -> None:
    confidence = np.tile([0.99, math.nan], 200)
    agrees = np.tile([True, False], 200)
    certificate = certify(confidence, agrees, np.repeat(np.arange(200), 2), 0.05)
    assert certificate.coverage == 0.5
    assert certificate.risk_hat == 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (([0.5], [True, False], [0]), "confidence and agrees"),
        (([0.5], [True], [0, 1]), "groups"),
        (([0.5], [True], None), "groups must name"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, names) -> None:
    with pytest.raises(ValueError, match=names):
        certify(*arguments, 0.1)


def test_settings_out_of_range_are_refused() -> None:
    rows = ([0.5], [True], [0])
    with pytest.raises(ValueError, match="grid"):
        certify(*rows, 0.1, grid=[0.1, 0.9])
    for delta, epsilon, names in ((0, 0.1, "delta"), (0.1, 1, "epsilon"), (math.nan, 0.1, "delta")):
        with pytest.raises(ValueError, match=names):
            certify(*rows, delta, epsilon)


@given(st.integers(1, 60), st.floats(0.01, 0.6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_certified_threshold_never_rises_with_the_risk_allowed(requests, delta, seed) -> None:
    table = losses(*trace(requests, np.random.default_rng(seed), tokens=8))
    found = []
    for allowed in (delta, min(delta * 1.5, 0.95)):
        try:
            found.append(certify_losses(table, allowed, 0.1).threshold)
        except TooLittleData:
            found.append(1.0)
    assert found[1] <= found[0]
