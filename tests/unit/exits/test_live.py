"""Exit policies at work: what they make of a stream of drafts, alone and together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.exits.budget import exit_share
from fathom.exits.live import LivePolicies, most_exits
from fathom.exits.policy import exits
from fathom.types import AcceptMode, ComputePolicy, Confidence, InvalidRequest, PolicyName

EXIT_COST = 0.3
ADAPTIVE = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE)
EASY = ((6, 2), (2, 6), 0.8)
HARD = ((9, 3), (8, 4), 0.25)
"""Betas of drafts that agree and disagree, and the share that agrees."""


def budget_of(budget: float, **fields: Any) -> ComputePolicy:
    fields.setdefault("mode", AcceptMode.FREE)
    return ComputePolicy(policy=PolicyName.BUDGET, budget=budget, **fields)


def drafts(kind: Any, rows: int, seed: int = 0) -> Iterator[tuple[float, bool]]:
    """Confidence and agreement of rows."""
    random = np.random.default_rng(seed)
    agrees, disagrees, share = kind
    for _ in range(rows):
        right = bool(random.random() < share)
        yield float(random.beta(*(agrees if right else disagrees))), right


def feed(policies: LivePolicies, kind: Any, rows: int, seed: int = 0) -> float:
    for confidence, agrees in drafts(kind, rows, seed):
        policies.threshold_for(ADAPTIVE, 0, 0)
        policies.observe(ADAPTIVE, confidence, agrees)
    threshold = policies.threshold_for(ADAPTIVE, 0, 0)
    assert threshold is not None
    return threshold


def test_adaptive_starts_at_frees_threshold_or_the_requests_own() -> None:
    policies = LivePolicies(EXIT_COST)
    assert policies.threshold_for(ADAPTIVE, 0, 0) == 0.9
    own = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE, exit_threshold=0.6)
    assert policies.threshold_for(own, 0, 0) == 0.6


@pytest.mark.parametrize("estimator", ["em", "moments"])
def test_adaptive_follows_a_switch_of_the_workload_within_500_rows(estimator: str) -> None:
    policies = LivePolicies(EXIT_COST, estimator=estimator)
    easy = feed(policies, EASY, 1000)
    hard = feed(policies, HARD, 500, seed=1)
    alone = feed(LivePolicies(EXIT_COST, estimator=estimator), HARD, 2000, seed=2)
    assert easy < hard
    assert hard == pytest.approx(alone, abs=0.14)  # two steps of the grid


def test_the_mixture_is_fitted_now_and_then_not_for_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fathom.exits import observed

    fits = 0
    fit = observed.em_steps

    def counting(*args: Any) -> Any:
        nonlocal fits
        fits += 1
        return fit(*args)

    monkeypatch.setattr(observed, "em_steps", counting)
    feed(LivePolicies(EXIT_COST), EASY, 640 + 1)
    assert fits == 640 // observed.REFIT


@pytest.mark.parametrize("kind", [EASY, HARD])
def test_no_step_waits_for_a_whole_fit(kind: Any) -> None:
    """A fit is asked for by a token, and done by the rows that are told of after it."""
    policies = LivePolicies(EXIT_COST)
    feed(policies, kind, 640)

    def fits() -> list[list[float]]:
        history: list[list[float]] = policies.snapshot()["measures"]["softmax_gap"]["history"]
        return history

    before = fits()
    rows = drafts(kind, 64, seed=3)
    assert fits() == before
    told = 0
    while fits() == before:
        policies.observe(ADAPTIVE, *next(rows))
        told += 1
    assert 4 <= told <= 24


def test_measures_temperatures_and_copied_states_are_kept_apart() -> None:
    policies = LivePolicies(EXIT_COST)
    for fields in (
        {},
        {"confidence": Confidence.MAX_PROB},
        {"exit_temperature": 1.5},
        {"mode": AcceptMode.COPY},
    ):
        compute = ComputePolicy(
            **{"mode": AcceptMode.FREE, "policy": PolicyName.ADAPTIVE, **fields}
        )
        policies.observe(compute, 0.5, True)
    measures = policies.snapshot()["measures"]
    assert set(measures) == {"softmax_gap", "max_prob", "softmax_gap@1.5", "softmax_gap+copy"}
    assert all(each["rows"]["agrees"] == 1 for each in measures.values())


def test_callers_cannot_make_it_remember_without_end() -> None:
    policies = LivePolicies(EXIT_COST)
    for step in range(100):
        compute = ComputePolicy(
            mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE, exit_temperature=1 + step / 100
        )
        policies.observe(compute, 0.5, True)
    assert len(policies.snapshot()["measures"]) <= 16


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_teaches_nothing(bad: float) -> None:
    policies = LivePolicies(EXIT_COST)
    policies.observe(ADAPTIVE, bad, True)
    assert policies.snapshot()["measures"] == {}


# Budgets


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 64), st.floats(0.01, 0.99), st.sampled_from(list(AcceptMode)))
def test_the_smallest_budget_that_is_named_is_taken(
    max_stack: int, exit_cost: float, mode: AcceptMode
) -> None:
    policies = LivePolicies(exit_cost)
    low = budget_of(1e-6, max_stack=max_stack, mode=mode)
    if mode is AcceptMode.FULL:
        policies.check(low)  # nothing is drafted, and nothing promised
        return
    with pytest.raises(InvalidRequest, match="budget must be at least") as error:
        policies.check(low)
    assert error.value.param == "budget"
    named = float(str(error.value).split("at least ")[1].split(",")[0])
    policies.check(budget_of(min(named, 1.0), max_stack=max_stack, mode=mode))
    share = most_exits(low)
    assert named == pytest.approx(1 - share * (1 - exit_cost), abs=2e-4)


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8, 1.0])
def test_what_is_realised_is_what_was_asked_for(budget: float) -> None:
    """Request by request, after a switch of the workload too, the stack's cap included."""
    policies = LivePolicies(EXIT_COST)
    compute = budget_of(budget, max_stack=8)
    for request in range(6):
        kind = HARD if request >= 3 else EASY
        exited = decided = stack = 0
        for confidence, agrees in drafts(kind, 250, seed=request):
            leaves = False
            if stack < compute.max_stack:
                threshold = policies.threshold_for(compute, exited, decided)
                leaves = exits(compute, confidence, threshold=threshold)
                policies.observe(compute, confidence, agrees)
            stack = stack + 1 if leaves else 0
            exited, decided = exited + leaves, decided + 1
        policies.completed(compute, exited=exited, decided=decided, asked=250, wrong=0)
        realised = 1 - exited / decided * (1 - EXIT_COST)
        assert realised == pytest.approx(budget, abs=0.05 if request == 0 else 0.025)


def test_a_budget_of_all_lets_nobody_go() -> None:
    policies = LivePolicies(EXIT_COST)
    feed(policies, EASY, 100)
    threshold = policies.threshold_for(budget_of(1.0), 0, 10)
    assert exit_share(1.0, EXIT_COST) == 0
    assert not exits(budget_of(1.0), 1.0, threshold=threshold)


# Promises


def risk_of(delta: float, **fields: Any) -> ComputePolicy:
    fields.setdefault("mode", AcceptMode.FREE)
    return ComputePolicy(policy=PolicyName.RISK, risk=delta, **fields)


def test_a_promise_without_a_certified_threshold_is_refused() -> None:
    policies = LivePolicies(EXIT_COST)
    with pytest.raises(InvalidRequest, match="certified") as error:
        policies.check(risk_of(0.05))
    assert error.value.param == "risk"
    policies.check(risk_of(0.05, exit_threshold=0.8))


def alerts(policies: LivePolicies) -> list[float]:
    return [v for name, v in policies.figures().items() if name.startswith("risk_alert")]


@pytest.mark.parametrize(("wrong", "alert"), [(0.03, 0.0), (0.12, 1.0)])
def test_an_alert_is_raised_where_completions_contradict_the_promise(
    wrong: float, alert: float
) -> None:
    policies, compute = LivePolicies(EXIT_COST), risk_of(0.05, exit_threshold=0.8)
    random = np.random.default_rng(0)
    for _ in range(200):
        count = int(random.binomial(60, wrong))
        policies.completed(compute, exited=30, decided=60, asked=60, wrong=count)
    assert alerts(policies) == [alert]
    (promise,) = policies.snapshot()["promises"]
    assert promise["observed"] == pytest.approx(wrong, abs=0.01)


def test_where_nobody_looks_there_is_nothing_to_watch() -> None:
    blind = risk_of(0.05, exit_threshold=0.8, mode=AcceptMode.COPY, probe_rate=0.0)
    policies = LivePolicies(EXIT_COST)
    policies.completed(blind, exited=30, decided=60, asked=60, wrong=0)
    assert alerts(policies) == []


def test_meta_needs_a_classifier() -> None:
    compute = ComputePolicy(confidence=Confidence.META)
    with pytest.raises(InvalidRequest, match="trained classifier") as error:
        LivePolicies(EXIT_COST).check(compute)
    assert error.value.param == "confidence"
    LivePolicies(EXIT_COST, has_meta=True).check(compute)


# Together


def test_replicas_that_see_halves_agree_with_one_that_sees_it_all() -> None:
    one, halves = LivePolicies(EXIT_COST), (LivePolicies(EXIT_COST), LivePolicies(EXIT_COST))
    for number, (confidence, agrees) in enumerate(drafts(EASY, 3000)):
        for policies in (one, halves[number % 2]):
            policies.threshold_for(ADAPTIVE, 0, 0)
            policies.observe(ADAPTIVE, confidence, agrees)
        if number % 100 == 99:
            told = [json.loads(json.dumps(half.snapshot())) for half in halves]
            halves[0].merge([told[1]])
            halves[1].merge([told[0]])
    found = [each.threshold_for(ADAPTIVE, 0, 0) for each in (*halves, one)]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(found[2], abs=0.07)  # one step of the grid
    budget = budget_of(0.6)
    merged, alone = halves[0].threshold_for(budget, 0, 0), one.threshold_for(budget, 0, 0)
    assert merged == pytest.approx(alone, abs=0.08)


def test_what_is_told_twice_counts_once() -> None:
    first, second = LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)
    feed(first, EASY, 500)
    feed(second, HARD, 500, seed=1)
    own = second.snapshot()["measures"]
    second.merge([first.snapshot()])
    once = second.threshold_for(ADAPTIVE, 0, 0)
    for _ in range(5):
        second.merge([first.snapshot()])
    assert second.threshold_for(ADAPTIVE, 0, 0) == once
    # What it tells is its own, never what it was told.
    assert (
        second.snapshot()["measures"]["softmax_gap"]["histogram"] == own["softmax_gap"]["histogram"]
    )


def test_a_replica_that_is_alone_again_goes_on_with_its_own() -> None:
    first, second = LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)
    feed(first, HARD, 1000, seed=1)
    before = feed(second, EASY, 1000)
    second.merge([first.snapshot()])
    assert second.threshold_for(ADAPTIVE, 0, 0) != before
    second.merge([])
    assert second.threshold_for(ADAPTIVE, 0, 0) == before


def test_a_new_replica_starts_from_what_others_know() -> None:
    old, new = LivePolicies(EXIT_COST), LivePolicies(EXIT_COST)
    known = feed(old, EASY, 1000)
    new.merge([old.snapshot()])
    assert new.threshold_for(ADAPTIVE, 0, 0) == pytest.approx(known, abs=0.07)


def test_the_state_is_visible() -> None:
    policies = LivePolicies(EXIT_COST)
    feed(policies, EASY, 640)
    policies.observe(ADAPTIVE, 0.5, None)
    for _ in range(63):
        policies.observe(ADAPTIVE, 0.5, None)
    found = policies.figures()
    now = policies.threshold_for(ADAPTIVE, 0, 0)
    assert found["exit_threshold{policy=adaptive,confidence=softmax_gap}"] == now
    assert found["policy_samples{confidence=softmax_gap,verdict=unlabelled}"] == 64
    agrees = found["policy_samples{confidence=softmax_gap,verdict=agrees}"]
    assert 0.7 * 640 < agrees < 0.9 * 640
    weight = found["mixture_weight{confidence=softmax_gap,verdict=agrees}"]
    assert weight == pytest.approx(0.8, abs=0.1)
    measure = policies.snapshot()["measures"]["softmax_gap"]
    # The last token asked for another fit, which the 64 rows after it did.
    assert [seen for seen, _ in measure["history"]] == list(range(64, 641, 64))
    assert measure["mixture"]["agrees"]["alpha"] > measure["mixture"]["agrees"]["beta"]


def test_adaptive_finds_its_threshold_among_confidences_that_are_never_low() -> None:
    """Saturation of a real model lies above 0.9, beyond FREE's grid."""
    policies = LivePolicies(EXIT_COST)
    policy = ComputePolicy(
        mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE, confidence=Confidence.SATURATION
    )
    left, wrong = 0, 0
    for confidence, agrees in drafts(((8, 2), (2, 8), 0.4), 3000):
        high = 0.95 + 0.04 * confidence
        threshold = policies.threshold_for(policy, 0, 0)
        assert threshold is not None
        if high > threshold:
            left, wrong = left + 1, wrong + (not agrees)
        policies.observe(policy, high, agrees)
    assert 0.95 < policies.threshold_for(policy, 0, 0) < 0.99
    assert 0.25 < left / 3000 < 0.6  # about the 40% that agree leave
    assert wrong < 0.2 * left
