"""What operating points were measured on, as the drift alarm compares it (``exits.drift``)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fathom.exits.drift import Expected, Level
from fathom.exits.histogram import edges
from fathom.exits.risk import Losses
from fathom.exits.shadow import BINS, measure_name
from fathom.exits.shadow_watch import DEFAULT
from fathom.tuning.operating_points import OperatingPoints, Point
from fathom.types import AcceptMode, ComputePolicy, InvalidRequest, PolicyName

Floats = NDArray[np.float64]

_LEVELS = (0.9, 0.75, 0.5, 0.25, 0.1)
"""Shares of the rows above the thresholds that are compared."""

_LEAST_MARGIN = 0.02
"""Of the agreement. A replay reads the full model's own text; live text holds tokens of the exit,
after which agreement may be a little lower without any drift."""

_LEAST_TOLERANCE = 0.05
"""Of a level's share, for the same reason, and for traffic that is never quite the same."""

_ERRORS = 2.0
"""Standard errors of the measurement itself that are allowed for, if that is more."""


def expectations(points: OperatingPoints | None, default: ComputePolicy) -> dict[str, Expected]:
    """What each point, and the server's default, promises, and on which confidences it was
    measured.

    Of policy ``risk`` the promise is δ itself. Of others it is the measured agreement less a
    margin: the larger of 0.02 and two standard errors of the mean over held-out requests, taken
    from the column of the calibration table whose mean loss is the nearest. Mode ``exact`` needs
    no promise. The shares of confidences may differ by the larger of 0.05 and two standard errors.
    """
    own = {DEFAULT: Expected(compute=default, loss=default.risk if _by_risk(default) else None)}
    if points is None:
        return own
    table = points.calibration.losses
    known = points.calibration
    measure = measure_name(known.confidence, known.exit_temperature)
    shares = _shares(table)
    levels, means = _levels(shares), tuple(shares.mean(axis=0).tolist())
    found = own
    for name, point in points.points.items():
        try:
            compute = points.resolve(name)
        except InvalidRequest:  # too little data for its promise: requests cannot name it either
            continue
        same = measure_name(compute.confidence, compute.exit_temperature) == measure
        found[name] = Expected(
            compute=compute,
            loss=_loss(compute, point, table),
            agreement=point.measured.get("agreement"),
            exit_rate=point.measured.get("exit_rate"),
            measure=measure if same else "",
            levels=levels if same else (),
            shares=means if same else (),
        )
    return found


def _loss(compute: ComputePolicy, point: Point, table: Losses) -> float | None:
    """δ of the test of agreement; None where nothing was promised or measured."""
    if compute.mode is AcceptMode.EXACT or not compute.drafts:
        return None
    if _by_risk(compute):
        return compute.risk
    if "agreement" not in point.measured:
        return None
    loss = 1 - point.measured["agreement"]
    each = table.wrong / table.rows[:, None]
    nearest = each[:, int(np.abs(each.mean(axis=0) - loss).argmin())]
    bound = loss + max(_LEAST_MARGIN, _ERRORS * _error(nearest))
    return bound if bound < 1 else None


def _by_risk(compute: ComputePolicy) -> bool:
    return compute.drafts and compute.policy is PolicyName.RISK


def _shares(table: Losses) -> Floats:
    """[requests, BINS] of each request's rows, the share in each bin."""
    # The table counts rows above a threshold; of its edges every second is one of ours.
    above = np.stack([_above(table, edge) for edge in edges(BINS)[1:-1]], axis=1)
    ends = table.rows[:, None]
    tail = np.concatenate([ends, above, np.zeros_like(ends)], axis=1) / ends
    found: Floats = -np.diff(tail, axis=1)
    return found


def _above(table: Losses, edge: float) -> NDArray[np.int32]:
    nearest = int(np.abs(table.grid - edge).argmin())
    found: NDArray[np.int32] = table.exits[:, nearest]
    return found


def _levels(shares: Floats) -> tuple[Level, ...]:
    """Thresholds nearest to the wanted shares, each once, none that all or no rows exceed."""
    tail = shares[:, ::-1].cumsum(axis=1)[:, ::-1]  # [requests, BINS] in the bin or above
    means = tail.mean(axis=0)
    bins = dict.fromkeys(int(np.abs(means[1:] - share).argmin()) + 1 for share in _LEVELS)
    return tuple(
        Level(
            bin=each,
            share=float(means[each]),
            tolerance=max(_LEAST_TOLERANCE, _ERRORS * _error(tail[:, each])),
        )
        for each in bins
        if 0 < means[each] < 1
    )


def _error(values: Floats) -> float:
    """Standard error of a mean over requests."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
