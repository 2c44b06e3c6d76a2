"""What a request says of its compute, and the policy that it gets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fathom.api.compute import resolve, resolve_default
from fathom.api.schemas import ComputeOptions
from fathom.exits.risk import certify_losses
from fathom.settings import ConfigError
from fathom.tuning.operating_points import OperatingPoints
from fathom.types import AcceptMode, ComputePolicy, Confidence, InvalidRequest, PolicyName
from tests.points import points_of

DEFAULT = ComputePolicy()
POINTS = points_of()
FREE = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.7, max_stack=4)


def ask(
    effort: str | None = None,
    default: ComputePolicy = DEFAULT,
    points: OperatingPoints | None = POINTS,
    **fields: Any,
) -> ComputePolicy:
    return resolve(ComputeOptions(**fields), effort, default, points)


def refused(*words: str, param: str, **asked: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        ask(**asked)
    assert error.value.param == param
    for word in words:
        assert word in str(error.value), str(error.value)


def test_who_says_nothing_gets_the_servers() -> None:
    for points in (None, POINTS):
        assert resolve(None, None, FREE, points) == FREE
        assert ask(default=FREE, points=points) == FREE


def test_explicit_fields_lie_over_the_servers() -> None:
    policy = ask(default=FREE, mode="rollback", rollback_nats=1)
    assert policy.mode is AcceptMode.ROLLBACK
    assert policy.policy is PolicyName.THRESHOLD
    assert (policy.exit_threshold, policy.max_stack, policy.rollback_nats) == (0.7, 4, 1)
    policy = ask(confidence="entropy", exit_temperature=2, probe_rate=0.1, load_aware=False)
    assert policy.confidence is Confidence.ENTROPY
    assert (policy.exit_temperature, policy.probe_rate, policy.load_aware) == (2, 0.1, False)


def test_names_from_a_file_become_enumeration_members() -> None:
    policy = resolve(None, None, ComputePolicy(mode="full", policy="never"))  # type: ignore[arg-type]
    assert policy.mode is AcceptMode.FULL
    assert policy.policy is PolicyName.NEVER


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({"budget": 0.8}, PolicyName.BUDGET),
        ({"risk": 0.1}, PolicyName.RISK),
        ({"exit_threshold": 0.3}, PolicyName.THRESHOLD),
        ({"forced_exit_rate": 0.3}, PolicyName.FORCED),
        ({"policy": "adaptive", "exit_threshold": 0.3}, PolicyName.ADAPTIVE),
        ({"policy": "adaptive"}, PolicyName.ADAPTIVE),
    ],
)
@pytest.mark.parametrize("default", [DEFAULT, dataclasses.replace(FREE, policy=PolicyName.ALWAYS)])
def test_a_field_implies_its_policy(
    default: ComputePolicy, fields: dict[str, Any], policy: PolicyName
) -> None:
    assert ask(default=default, **fields).policy is policy


def test_a_point_is_taken_by_its_name() -> None:
    draft = ask(operating_point="draft")
    assert draft == POINTS.points["draft"].compute
    assert draft.operating_point == "draft"
    assert ask(operating_point="fast").budget == 0.7
    assert ask(operating_point="fast").exit_threshold is not None
    balanced = ask(operating_point="balanced")
    assert balanced.exit_threshold == certify_losses(POINTS.calibration.losses, 0.05).threshold
    # Other fields change it; it keeps its name as long as it exits as it did.
    assert ask(operating_point="draft", max_stack=3) == dataclasses.replace(draft, max_stack=3)
    changed = ask(operating_point="draft", mode="rollback")
    assert (changed.mode, changed.operating_point) == (AcceptMode.ROLLBACK, "")
    assert changed.exit_threshold == 0.5


def test_a_point_that_is_not_there() -> None:
    refused("exact, balanced, fast", "'fastest'", param="compute.operating_point",
            operating_point="fastest")  # fmt: skip
    refused("no operating points", "fathom calibrate fit", param="compute.operating_point",
            operating_point="fast", points=None)  # fmt: skip


@pytest.mark.parametrize(
    ("effort", "point", "mode"),
    [
        ("low", "fast", AcceptMode.FREE),
        ("medium", "balanced", AcceptMode.ROLLBACK),
        ("high", "exact", AcceptMode.EXACT),
    ],
)
def test_efforts_are_points_or_modes(effort: str, point: str, mode: AcceptMode) -> None:
    assert ask(effort) == POINTS.resolve(point)
    assert ask(effort).operating_point == point
    without = ask(effort, points=None, default=FREE)
    assert without == dataclasses.replace(FREE, mode=mode)
    full = ComputePolicy(mode=AcceptMode.FULL, policy=PolicyName.NEVER)
    assert ask(effort, points=None, default=full).drafts
    some = dataclasses.replace(POINTS, points={"draft": POINTS.points["draft"]})
    assert ask(effort, points=some, default=FREE) == without


def test_what_is_explicit_comes_before_the_effort() -> None:
    assert ask("high", operating_point="draft").operating_point == "draft"
    assert ask("low", mode="exact").mode is AcceptMode.EXACT
    budget = ask("high", budget=0.8)
    assert (budget.policy, budget.mode) == (PolicyName.BUDGET, AcceptMode.FREE)
    assert (budget.budget, budget.operating_point) == (0.8, "")
    assert ask("low", max_stack=2).operating_point == "fast"
    with pytest.raises(InvalidRequest, match="low, medium, high, got 'extreme'") as error:
        ask("extreme")
    assert error.value.param == "reasoning_effort"


def test_an_effort_whose_point_promises_too_much() -> None:
    with pytest.raises(InvalidRequest, match="reasoning_effort medium") as error:
        ask("medium", points=points_of(requests=5))
    assert error.value.param == "reasoning_effort"


def test_risk_takes_the_certified_threshold() -> None:
    policy = ask(risk=0.05)
    found = certify_losses(POINTS.calibration.losses, 0.05, 0.1)
    assert policy.exit_threshold == found.threshold < 1
    assert (policy.confidence, policy.exit_temperature) == (Confidence.SOFTMAX_GAP, 1.25)
    assert policy.mode is AcceptMode.FREE
    surer = ask(risk=0.05, risk_confidence=0.999)
    assert surer.exit_threshold is not None
    assert surer.exit_threshold > found.threshold
    # A threshold of the server, or of a point, certifies nothing else than what it was made for.
    assert ask(default=FREE, risk=0.05).exit_threshold == found.threshold
    own = ask(operating_point="balanced", risk_confidence=0.999)
    assert own.exit_threshold == surer.exit_threshold
    assert ask(risk=0.05, mode="exact").mode is AcceptMode.EXACT
    assert ask(default=dataclasses.replace(FREE, mode=AcceptMode.ROLLBACK), risk=0.05).mode is (
        AcceptMode.ROLLBACK
    )


@given(st.floats(0.03, 0.5), st.floats(0.03, 0.5))
def test_a_larger_risk_never_gets_a_higher_threshold(one: float, other: float) -> None:
    low, high = (ask(risk=each).exit_threshold for each in sorted((one, other)))
    assert low is not None
    assert high is not None
    assert high <= low


def test_risk_that_the_data_cannot_carry() -> None:
    few = points_of(requests=20)
    refused("from 20 requests", "would do", param="compute.risk", risk=0.02, points=few)
    refused("no calibration data", "fathom calibrate fit", "fathom serve --operating-points",
            param="compute.risk", risk=0.05, points=None)  # fmt: skip
    refused("'softmax_gap'", param="compute.confidence", risk=0.05, confidence="entropy")
    refused("1.25", param="compute.exit_temperature", risk=0.05, exit_temperature=1)


def test_budgets_start_where_the_table_says() -> None:
    policy = ask(budget=0.8)
    assert policy.exit_threshold == pytest.approx(POINTS.threshold_at(0.4))
    assert (policy.mode, policy.exit_temperature) == (AcceptMode.FREE, 1.25)
    own = ask(budget=0.8, confidence="entropy")
    assert (own.confidence, own.exit_threshold) == (Confidence.ENTROPY, None)
    assert ask(budget=0.8, points=None, default=FREE).exit_threshold is None
    other = ask(operating_point="fast", confidence="entropy")
    assert (other.budget, other.exit_threshold) == (0.7, None)
    refused("at least 0.5556", "got 0.52", param="compute.budget", budget=0.52)
    refused("(0, 1]", "got 1.5", param="compute.budget", budget=1.5)
    assert ask(budget=0.5556).budget == 0.5556
    refused("at least", param="compute.budget", budget=0.65, max_stack=1)


@pytest.mark.parametrize(
    ("fields", "param", "other"),
    [
        ({"budget": 0.8, "risk": 0.05}, "risk", "compute.budget"),
        ({"operating_point": "fast", "budget": 0.8}, "budget", "compute.operating_point"),
        ({"operating_point": "fast", "risk": 0.05}, "risk", "compute.operating_point"),
        ({"budget": 0.8, "exit_threshold": 0.5}, "exit_threshold", "compute.budget"),
        ({"risk": 0.05, "exit_threshold": 0.5}, "exit_threshold", "compute.risk"),
        ({"risk": 0.05, "policy": "threshold"}, "policy", "compute.risk"),
        ({"budget": 0.8, "policy": "risk"}, "policy", "compute.budget"),
        ({"budget": 0.8, "mode": "full"}, "mode", "compute.budget"),
        ({"risk": 0.05, "mode": "copy"}, "mode", "compute.risk"),
    ],
)
def test_contradictions_are_refused_by_both_names(
    fields: dict[str, Any], param: str, other: str
) -> None:
    refused(f"compute.{param} contradicts", other, param=f"compute.{param}", **fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "magic"}, "mode"),
        ({"policy": "magic"}, "policy"),
        ({"policy": "budget"}, "budget"),
        ({"policy": "risk"}, "risk"),
        ({"confidence": "magic"}, "confidence"),
        ({"risk": 0.0}, "risk"),
        ({"risk": 0.05, "risk_confidence": 1}, "risk_confidence"),
        ({"exit_threshold": 2}, "exit_threshold"),
        ({"probe_rate": -1}, "probe_rate"),
        ({"max_stack": 0}, "max_stack"),
    ],
)
def test_what_is_out_of_range_is_named(fields: dict[str, Any], param: str) -> None:
    refused(param=f"compute.{param}", **fields)


def test_unknown_fields_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="operating_pint"):
        ComputeOptions(operating_pint="fast")  # type: ignore[call-arg]


def test_a_promise_ends_with_its_policy() -> None:
    base = ask(risk=0.05)
    assert ask(default=base, budget=0.8).risk is None
    threshold = ask(default=base, exit_threshold=0.2)
    assert (threshold.policy, threshold.risk) == (PolicyName.THRESHOLD, None)
    assert ask(default=ask(budget=0.8), risk=0.05).budget is None


def test_the_servers_own_policy_can_be_a_point_or_a_promise() -> None:
    named = ComputePolicy(operating_point="draft")
    assert resolve_default(named, POINTS) == POINTS.points["draft"].compute
    risk = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.RISK, risk=0.05)
    assert resolve_default(risk, POINTS) == ask(risk=0.05)
    assert resolve_default(FREE, None) == FREE
    for compute, points, words in (
        (named, None, "no operating points"),
        (risk, None, "no calibration data"),
        (dataclasses.replace(named, max_stack=3), POINTS, "must be the only field"),
        (ComputePolicy(operating_point="none"), POINTS, "must be one of exact"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve_default(compute, points)
