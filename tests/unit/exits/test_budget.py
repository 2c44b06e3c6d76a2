"""EERO's shares and thresholds, against a general optimizer and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize

from fathom.checks import InvalidRequest
from fathom.exits.aggregation import (
    exponential_weights,
    one_threshold_shares,
    quantile_thresholds,
)
from fathom.exits.budget import apply, exit_share, fit_exits

COSTS = np.array([0.25, 0.5, 0.75, 1.0])


def heads_of(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and correctness of four heads, deeper ones better, all calibrated."""
    random = np.random.default_rng(seed)
    difficulty = random.random(n)[:, None]
    logit = 5 * (np.array([0.3, 0.5, 0.65, 0.75]) - difficulty) + random.normal(0, 0.8, (n, 4))
    confidence = 1 / (1 + np.exp(-logit))
    return confidence, random.random((n, 4)) < confidence


@given(
    risks=st.lists(st.floats(0, 1), min_size=2, max_size=6),
    steps=st.lists(st.floats(0.05, 1), min_size=6, max_size=6),
    at=st.floats(0.05, 1.2),
    beta=st.floats(0.05, 2),
)
@settings(max_examples=40, deadline=None)
def test_shares_solve_the_problem(risks, steps, at, beta) -> None:
    r = np.array(risks)
    costs = np.cumsum(steps[: len(r)])
    costs /= costs[-1]
    budget = costs[0] + at * (1 - costs[0])
    p = exponential_weights(r, costs, budget, beta)
    assert p.sum() == pytest.approx(1)
    assert p @ costs <= budget * (1 + 1e-9)

    def objective(q: np.ndarray) -> float:
        q = np.maximum(q, 1e-12)
        return float(q @ r + beta * (q * np.log(q * len(r))).sum())

    found = optimize.minimize(
        objective,
        np.full(len(r), 1 / len(r)),
        bounds=[(0, 1)] * len(r),
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: budget - q @ costs},
        ],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assume(found.success)
    assert objective(p) <= found.fun + 1e-6
    np.testing.assert_allclose(p, found.x, atol=5e-3)


@given(
    risks=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    budget=st.floats(0.2, 1),
    beta=st.floats(0.01, 3),
    prior=st.lists(st.floats(1e-6, 1), min_size=3, max_size=3),
)
def test_shares_meet_the_conditions_of_karush_kuhn_and_tucker(risks, budget, beta, prior) -> None:
    r, costs = np.array(risks), np.array([0.2, 0.6, 1.0])
    p = exponential_weights(r, costs, budget, beta, prior)
    assume(p.min() > 1e-200)
    # Stationarity: R + beta log(p / pi) + mu B is the same at all heads, with one mu >= 0.
    level = r + beta * np.log(p / np.array(prior))
    mu = -(level[1] - level[0]) / 0.4
    assert -(level[2] - level[1]) / 0.4 == pytest.approx(mu, rel=1e-4, abs=1e-6 * max(1, beta))
    assert mu >= -1e-6 * max(1, beta)
    # Complementary slackness: the budget is spent, or nobody pays for it.
    if p @ costs < budget * (1 - 1e-6):
        assert mu == pytest.approx(0, abs=1e-6 * max(1, beta))


def test_the_guarantee_of_the_aggregation_holds_against_random_shares() -> None:
    random = np.random.default_rng(0)
    r, beta, budget = np.array([0.5, 0.3, 0.2, 0.25]), 0.1, 0.6
    p = exponential_weights(r, COSTS, budget, beta)
    for q in random.dirichlet(np.ones(4), 2000):
        if q @ COSTS <= budget:
            q = np.maximum(q, 1e-300)
            assert p @ r <= q @ r + beta * (q * np.log(4 * q)).sum() + 1e-9


def test_ends_of_the_budget() -> None:
    r = [0.4, 0.3, 0.2, 0.1]
    assert exponential_weights(r, COSTS, 0.25, 0.1).tolist() == pytest.approx([1, 0, 0, 0])
    slack = exponential_weights(r, COSTS, 1.0, 0.001)
    assert slack.tolist() == pytest.approx([0, 0, 0, 1])
    # Where deeper heads overthink, a slack budget is not spent on them.
    assert exponential_weights([0.4, 0.1, 0.2, 0.3], COSTS, 1.0, 0.001)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("risks", "costs", "budget", "beta", "names"),
    [
        ([0.1, 0.2], [0.5, 1], 0.4, 0.1, "budget must be at least 0.5"),
        ([0.1, 0.2], [0.5, 1], float("nan"), 0.1, "budget"),
        ([0.1, 0.2], [1, 0.5], 1, 0.1, "ascend"),
        ([0.1, 0.2], [0.5], 1, 0.1, "heads"),
        ([0.1, float("nan")], [0.5, 1], 1, 0.1, "risks"),
        ([0.1, 0.2], [0.5, 1], 1, 0.0, "beta"),
    ],
)
def test_what_cannot_be_solved_is_refused(risks, costs, budget, beta, names) -> None:
    with pytest.raises(ValueError, match=names):
        exponential_weights(risks, costs, budget, beta)


@pytest.mark.parametrize("target", [0.4, 0.6, 0.8])
def test_the_budget_is_met_on_rows_that_were_not_calibrated_on(target) -> None:
    # eero.md's check: M = 4, N = 5000. The mean of three draws, for the test rows vary too.
    realised = []
    for seed in range(3):
        fitted = fit_exits(*heads_of(5000, seed), COSTS, target, beta=0.1)
        assert fitted.cost == pytest.approx(target, abs=2e-4)
        exits = apply(heads_of(5000, 100 + seed)[0], fitted.thresholds)
        realised.append(COSTS[exits].mean())
    assert np.mean(realised) == pytest.approx(target, rel=0.02)


def test_surest_rows_leave_first_so_that_accuracy_beats_random_exits() -> None:
    fitted = fit_exits(*heads_of(5000, 0), COSTS, 0.6)
    confidence, correct = heads_of(5000, 7)
    accuracy = correct[np.arange(5000), apply(confidence, fitted.thresholds)].mean()
    at_random = np.dot(fitted.shares, correct.mean(axis=0))
    assert accuracy > at_random + 0.03
    assert accuracy == pytest.approx(fitted.accuracy, abs=0.03)


@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([0.0, 0.25, 0.5, 0.999, 1.0, float("nan")]), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=25,
    ),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_thresholds_do_what_was_said_of_the_calibration_rows(rows, shares) -> None:
    confidence, p = np.array(rows), np.array(shares) / sum(shares)
    thresholds, exits = quantile_thresholds(confidence, p)
    np.testing.assert_array_equal(apply(confidence, thresholds), exits)
    # Rows without a confidence never leave before the end.
    for row, head in zip(confidence, exits, strict=True):
        assert head == 2 or not np.isnan(row[head])
    # Whoever leaves at the first head is at least as sure as those who stay.
    first, stay = confidence[exits == 0, 0], confidence[exits > 0, 0]
    stay = stay[~np.isnan(stay)]
    assert not len(first) or not len(stay) or first.min() > stay.max()
    # Equal rows leave together: the cost errs on the side of the budget, where rows can leave.
    sure = int((~np.isnan(confidence[:, 0])).sum())
    assert len(first) >= min(round(float(p[0]) * len(rows)), sure)


def test_without_ties_shares_are_met_to_the_row() -> None:
    confidence = np.random.default_rng(0).random((1000, 3))
    _, exits = quantile_thresholds(confidence, [0.301, 0.25, 0.449])
    assert np.bincount(exits).tolist() == [301, 250, 449]


def test_apply_leaves_its_input_alone_and_nan_waits() -> None:
    confidence = np.array([[0.9, 0.1], [0.1, 0.9], [np.nan, np.nan]])
    assert apply(confidence, [0.5, 2.0]).tolist() == [0, 1, 1]
    assert confidence[0].tolist() == [0.9, 0.1]


def test_fit_takes_the_beta_that_does_best_and_spends_the_budget() -> None:
    rows = heads_of(4000, 1)
    fitted = fit_exits(*rows, COSTS, 0.8)
    assert fitted.cost == pytest.approx(0.8, abs=0.005)
    for beta in (0.003, 0.1, 1.0):
        other = fit_exits(*rows, COSTS, 0.8, beta=beta)
        assert fitted.accuracy >= other.accuracy - 1e-12 or other.cost < 0.79


@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0, float("nan")]), min_size=3, max_size=3),
        min_size=1,
        max_size=20,
    ),
    budget=st.floats(0.2, 1),
)
def test_shares_of_one_threshold_are_those_of_the_best_one_tried(rows, budget) -> None:
    confidence, costs = np.array(rows), np.array([0.2, 0.6, 1.0])
    found = one_threshold_shares(confidence, costs, budget)
    assert found.sum() == pytest.approx(1)
    assert found.min() >= 0
    tried = [apply(confidence, np.full(3, t)) for t in (0.0, 0.3, 0.5, 0.9, 1.0)]
    cost = float(found @ costs)
    assert any(np.allclose(np.bincount(e, minlength=3) / len(rows), found) for e in tried) or (
        np.isnan(confidence).all()
    )
    # None that the budget allows costs more.
    allowed = [costs[e].mean() for e in tried if costs[e].mean() <= budget]
    seen = confidence[~np.isnan(confidence)]
    if allowed and len(seen):
        assert cost <= budget + 1e-9
        reachable = [costs[apply(confidence, np.full(3, t))].mean() for t in np.unique(seen)]
        assert cost == pytest.approx(
            max((c for c in reachable if c <= budget + 1e-12), default=cost)
        )


def test_the_prior_carries_what_errors_do_not_tell() -> None:
    # Only confidence tells that half of the rows are easy for the first head already, and the
    # others hard for all heads but the last: the heads between are of no use to anybody.
    random = np.random.default_rng(0)
    n = 6000
    easy = random.random(n) < 0.5
    accuracy = np.where(easy[:, None], 0.99, np.array([0.4, 0.42, 0.44, 0.9]))
    confidence = np.clip(accuracy + random.normal(0, 0.05, (n, 4)), 0, 1)
    correct = random.random((n, 4)) < accuracy
    budget = 0.625
    assert one_threshold_shares(confidence, COSTS, budget)[[0, 3]].min() > 0.4
    with_prior = fit_exits(confidence, correct, COSTS, budget)
    without = fit_exits(confidence, correct, COSTS, budget, beta=0.1)
    assert with_prior.accuracy > without.accuracy + 0.01
    assert with_prior.cost == pytest.approx(budget, abs=0.005)


def test_a_budget_that_buys_nothing_is_left_or_spent_as_asked() -> None:
    random = np.random.default_rng(1)
    accuracy = np.array([0.8, 0.9, 0.85, 0.8])  # deeper heads overthink
    correct = random.random((5000, 4)) < accuracy
    confidence = random.random((5000, 4))
    assert fit_exits(confidence, correct, COSTS, 0.9).cost < 0.7
    spent = fit_exits(confidence, correct, COSTS, 0.7, spend=True)
    left = fit_exits(confidence, correct, COSTS, 0.7)
    assert left.accuracy >= spent.accuracy
    assert np.dot(spent.shares, COSTS) >= np.dot(left.shares, COSTS) - 1e-9


def test_a_prior_that_rules_a_head_out_is_refused() -> None:
    with pytest.raises(ValueError, match="prior"):
        exponential_weights([0.1, 0.2], [0.5, 1], 1, 0.1, [1, 0])


def test_fit_refuses_arrays_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="rows, heads"):
        fit_exits(np.zeros((3, 2)), np.zeros((3, 3)), [0.5, 1], 1)
    with pytest.raises(ValueError, match="at least one row"):
        fit_exits(np.zeros((0, 2)), np.zeros((0, 2)), [0.5, 1], 1)


@given(st.floats(0.05, 0.95), st.floats(0, 1))
def test_the_exit_share_costs_the_budget(exit_cost, at) -> None:
    budget = exit_cost + at * (1 - exit_cost)
    share = exit_share(budget, exit_cost)
    assert 0 <= share <= 1
    assert share * exit_cost + (1 - share) == pytest.approx(budget)


def test_the_exit_share_names_the_smallest_budget() -> None:
    with pytest.raises(InvalidRequest, match=r"at least 0\.4") as caught:
        exit_share(0.3, 0.4)
    assert caught.value.param == "budget"
