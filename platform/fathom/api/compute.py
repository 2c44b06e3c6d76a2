"""From what a request says of its compute to the policy that the engine gets.

Explicit fields come first, then the operating point, then ``reasoning_effort``, then the server's
setting. A promise (``budget``, ``risk``) becomes a policy with a threshold here, by the calibration
table of the server's operating points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fathom.api.schemas import ComputeOptions
from fathom.exits.live import LivePolicies
from fathom.settings import ConfigError
from fathom.tuning.operating_points import EFFORT_MODES, EFFORTS, OperatingPoints
from fathom.types import AcceptMode, ComputePolicy, InvalidRequest, PolicyName

HOW_TO_MAKE = (
    "`fathom calibrate fit TRACE --out FILE` makes one, and `fathom serve --operating-points FILE` "
    "serves it"
)

_CHOICES = ("operating_point", "budget", "risk")
"""Fields of which a request can give one: each says what threshold is taken."""

_IMPLIED = {
    "budget": PolicyName.BUDGET,
    "risk": PolicyName.RISK,
    "exit_threshold": PolicyName.THRESHOLD,
    "forced_exit_rate": PolicyName.FORCED,
}
"""Policies that follow from a field where ``policy`` is not given."""

_OF_A_POINT = frozenset(
    {"mode", "policy", "exit_threshold", "budget", "risk", "confidence", "exit_temperature"}
)
"""Fields after whose change a policy is no longer that of the operating point it came from."""


def resolve(
    options: ComputeOptions | None,
    effort: str | None,
    default: ComputePolicy,
    points: OperatingPoints | None = None,
) -> ComputePolicy:
    """The policy that a request asks for.

    ``budget`` and ``risk`` allow other tokens than the full model's: where neither the request nor
    what it builds on names a mode that does, they take ``free``.

    Args:
        options: the request's ``compute``. effort: its ``reasoning_effort``.
        default: the server's policy. points: its operating points, if it has any.

    Raises:
        InvalidRequest: naming the field as ``compute.<field>``, or ``reasoning_effort``.
    """
    given = {} if options is None else options.model_dump(exclude_none=True)
    base = default if effort is None else _of_effort(effort, default, points)
    try:
        _check_alone(given)
        name = given.pop("operating_point", None)
        if name is not None:
            base = _of_point(name, points)
        return _promised(_laid_over(given, base), given, points)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"compute.{error}", param=f"compute.{error.param}", code=error.code
        ) from error


def resolve_default(compute: ComputePolicy, points: OperatingPoints | None) -> ComputePolicy:
    """The server's own policy, which may name an operating point or promise something too.

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """
    try:
        if compute.operating_point:
            name = compute.operating_point
            if compute != ComputePolicy(operating_point=name):
                raise InvalidRequest(
                    f"operating_point must be the only field where it is given, got {name!r} "
                    "beside others: put a point of your own into the file.",
                    param="operating_point",
                )
            return _of_point(name, points)
        return _promised(compute, {}, points)
    except InvalidRequest as error:
        raise ConfigError(f"compute.{error}") from error


def _of_effort(
    effort: str, default: ComputePolicy, points: OperatingPoints | None
) -> ComputePolicy:
    if effort not in EFFORTS:
        raise InvalidRequest(
            f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort!r}.",
            param="reasoning_effort",
        )
    found = None
    if points is not None:
        try:
            found = points.for_effort(effort)
        except InvalidRequest as error:
            raise InvalidRequest(
                f"reasoning_effort {effort} stands for the operating point {EFFORTS[effort]}, "
                f"which cannot be taken: {error}",
                param="reasoning_effort",
            ) from error
    if found is not None:
        return found
    policy = PolicyName.THRESHOLD if not default.drafts else default.policy
    return dataclasses.replace(default, mode=EFFORT_MODES[effort], policy=policy)


def _of_point(name: str, points: OperatingPoints | None) -> ComputePolicy:
    if points is None:
        raise InvalidRequest(
            f"operating_point {name!r}: this server has no operating points; {HOW_TO_MAKE}.",
            param="operating_point",
        )
    return points.resolve(name)


def _check_alone(given: Mapping[str, Any]) -> None:
    """Check that no field contradicts another."""
    choices = [name for name in _CHOICES if name in given]
    if len(choices) > 1:
        first, second = choices[:2]
        raise InvalidRequest(
            f"{second} contradicts compute.{first}, got {given[second]!r} and {given[first]!r}: "
            "give one of operating_point, budget and risk.",
            param=second,
        )
    for name in ("budget", "risk"):
        if name not in given:
            continue
        if "exit_threshold" in given:
            raise InvalidRequest(
                f"exit_threshold contradicts compute.{name}, which finds the threshold, got "
                f"{given['exit_threshold']!r} and {given[name]!r}: give one of them.",
                param="exit_threshold",
            )
        if given.get("policy", name) != name:
            raise InvalidRequest(
                f"policy contradicts compute.{name}, got {given['policy']!r} and {given[name]!r}: "
                f"leave out one of them.",
                param="policy",
            )
        # Copied keys and values are another model than the one that was calibrated.
        impossible = ("full", "copy") if name == "risk" else ("full",)
        if given.get("mode") in impossible:
            raise InvalidRequest(
                f"mode contradicts compute.{name}, got {given['mode']!r} and {given[name]!r}: "
                "take free, rollback or exact, or leave it out.",
                param="mode",
            )


def _laid_over(given: Mapping[str, Any], base: ComputePolicy) -> ComputePolicy:
    """The explicit fields over what they build on, and what follows from them.

    Raises:
        InvalidRequest: for a value out of range.
    """
    fields = dict(given)
    promise = next((name for name in ("budget", "risk") if name in given), None)
    implied = next((_IMPLIED[name] for name in _IMPLIED if name in given), base.policy)
    fields.setdefault("policy", implied)
    if promise is not None:
        fields["exit_threshold"] = None
        if base.mode in (AcceptMode.FULL, AcceptMode.EXACT) or (
            promise == "risk" and base.mode is AcceptMode.COPY
        ):
            fields.setdefault("mode", AcceptMode.FREE)
    # What another policy has promised holds no longer.
    for name in ("budget", "risk"):
        if fields["policy"] != name:
            fields.setdefault(name, None)
    if _OF_A_POINT & set(given):
        fields["operating_point"] = ""
    # A threshold that was found for another promise, or is of another measure, is none.
    recalibrated = {
        PolicyName.RISK: {"risk_confidence"},
        PolicyName.BUDGET: {"confidence", "exit_temperature"},
    }.get(PolicyName(base.policy), set())
    if fields["policy"] == base.policy and recalibrated & set(given):
        fields.setdefault("exit_threshold", None)
    policy = dataclasses.replace(base, **fields)
    policy.validate()
    return policy


def _promised(
    policy: ComputePolicy, given: Mapping[str, Any], points: OperatingPoints | None
) -> ComputePolicy:
    """A policy whose promise, if it makes one, has its threshold."""
    if policy.policy is PolicyName.RISK and policy.drafts:
        if points is None:
            raise InvalidRequest(
                f"risk {policy.risk:g} cannot be promised: this server has no calibration data. A "
                f"file of operating points holds it: {HOW_TO_MAKE}.",
                param="risk",
            )
        own = points.calibration
        for name, value in (
            ("confidence", own.confidence.value),
            ("exit_temperature", own.exit_temperature),
        ):
            if given.get(name, value) != value:
                raise InvalidRequest(
                    f"{name} must be left out with compute.risk, or be {value!r}, which the "
                    f"calibration data is of, got {given[name]!r}.",
                    param=name,
                )
        return policy if policy.exit_threshold is not None else points.with_risk(policy)
    if policy.policy is PolicyName.BUDGET and policy.drafts and points is not None:
        # As the engine will: it may be far away.
        LivePolicies(points.identity.exit_cost, has_meta=True).check(policy)
        if policy.exit_threshold is None and not {"confidence", "exit_temperature"} & set(given):
            return points.with_budget(policy)
    return policy
