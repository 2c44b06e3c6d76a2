"""What an evaluation compares: accept modes, each at a threshold, and the baselines of free.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fathom.evaluation.errors import EvaluationError
from fathom.types import AcceptMode, ComputePolicy, InvalidRequest, PolicyName

STATIC = "static"
RANDOM = "random"
NAMES = (*AcceptMode, STATIC, RANDOM)


def read_points(names: Sequence[str], compute: ComputePolicy) -> dict[str, ComputePolicy]:
    """Compute policies by the names that the report gives them; mode full comes first.

    - a mode, or ``MODE@λ`` with an exit threshold of its own;
    - ``static``: every token after the first leaves at the exit; no deep layer runs after the
      prompt (their keys and values are never looked at);
    - ``random``: mode ``free`` with exits drawn at the rate of the ``free`` named before it.

    Args:
        compute: what the points share.

    Raises:
        EvaluationError: naming the point that cannot be read.
    """
    full = AcceptMode.FULL.value
    points = {full: dataclasses.replace(compute, mode=AcceptMode.FULL)}
    for name in names:
        if name != full:
            points[name] = _point(name, compute)
    if RANDOM in points and rate_giver(points) is None:
        raise EvaluationError(
            "point random takes its exit rate from a free one: name free, or free@X, before it."
        )
    return points


def rate_giver(points: dict[str, ComputePolicy]) -> str | None:
    """The point whose exit rate ``random`` takes: the last of mode free before it."""
    giver = None
    for name in points:
        if name == RANDOM:
            return giver
        if name.partition("@")[0] == AcceptMode.FREE:
            giver = name
    return None


def _point(name: str, compute: ComputePolicy) -> ComputePolicy:
    if name == STATIC:
        return dataclasses.replace(compute, mode=AcceptMode.COPY, policy=PolicyName.ALWAYS)
    if name == RANDOM:
        return dataclasses.replace(compute, mode=AcceptMode.FREE, policy=PolicyName.FORCED)
    mode, at, threshold = name.partition("@")
    if mode not in list(AcceptMode):
        known = ", ".join(NAMES)
        raise EvaluationError(
            f"--modes must be a list of {known}, or of a mode with its exit threshold such as "
            f"free@0.8, got {name!r}."
        )
    point = dataclasses.replace(compute, mode=AcceptMode(mode))
    if not at:
        return point
    if point.mode is AcceptMode.FULL:
        raise EvaluationError(
            f"--modes: nothing exits in mode {mode}, so write {mode}, not {name}."
        )
    try:
        point = dataclasses.replace(
            point, policy=PolicyName.THRESHOLD, exit_threshold=float(threshold)
        )
        point.validate()
    except (ValueError, InvalidRequest) as error:
        raise EvaluationError(
            f"--modes: the threshold of {name!r} must be a number from 0 to 1."
        ) from error
    return point
