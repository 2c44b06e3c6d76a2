"""Operating points from a trace: chosen on some of its requests, measured on the others."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fathom.compute import AcceptMode, ComputePolicy, Confidence, PolicyName
from fathom.exits.calibration import FittedTemperature, fit_temperature
from fathom.exits.live import most_exits
from fathom.exits.p_values import Bound
from fathom.exits.risk import Certificate, TooLittleData, certify_losses, losses
from fathom.tuning.budget_replay import MAX_STACK, first_threshold, live_exits, outcome
from fathom.tuning.loss_table import grid
from fathom.tuning.operating_points import Calibration, Identity, OperatingPoints, Point
from fathom.tuning.replay import replay_trace
from fathom.tuning.rows import Bools, Floats, Measure, TraceRows

CHOOSING_SHARE = 0.3
"""Of the requests; the promise needs the others."""

_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a trace gave.

    Attributes:
        temperature: None where the measure does not depend on it.
        certificates: of the risks that were asked for. refused: why there is none, by risk.
    """

    points: OperatingPoints
    temperature: FittedTemperature | None
    certificates: list[Certificate] = field(default_factory=list)
    refused: dict[float, str] = field(default_factory=dict)


def fit_points(
    rows: TraceRows,
    path: Path,
    *,
    confidence: Confidence = Confidence.SOFTMAX_GAP,
    risks: tuple[float, ...] = (0.02, 0.05, 0.1),
    epsilon: float = 0.1,
    bound: Bound = Bound.HOEFFDING_BENTKUS,
    balanced_risk: float = 0.05,
    fast_agreement: float = 0.9,
    seed: int = 0,
) -> Fitted:
    """Fit the temperature, choose the points, measure them, certify the risks.

    Temperature and thresholds are chosen on ``CHOOSING_SHARE`` of the requests, figures and
    certificates are of the others: a certificate holds for data that has chosen nothing.

    Args:
        path: of the trace, for its digest. bound: of the certificates.
        balanced_risk: δ of the point ``balanced``. fast_agreement: of the point ``fast``: it
            spends the least budget whose tokens agree with the full model so often.

    Raises:
        ValueError: for a trace of fewer than two requests.
    """
    choose, rest = rows.halves(seed, CHOOSING_SHARE)
    fitted = None
    measure = Measure(confidence)
    if confidence is not Confidence.SATURATION:
        fitted = fit_temperature(choose.deep, choose.lse)
        measure = Measure(confidence, round(fitted.temperature, 3))
    table = losses(measure.of(rest), rest.agrees, rest.groups, grid=grid())
    certificates, refused = [], {}
    for delta in dict.fromkeys((*risks, balanced_risk)):
        try:
            certificates.append(certify_losses(table, delta, epsilon, bound))
        except TooLittleData as error:
            refused[delta] = str(error)
    found = {each.delta: each for each in certificates}
    points = {
        "exact": _exact(choose, rest, measure),
        "balanced": _balanced(choose, rest, measure, balanced_risk, found.get(balanced_risk)),
        "fast": _fast(choose, rest, measure, fast_agreement),
    }
    source = rows.source
    identity = Identity(
        model=source.model,
        weights_digest=source.weights_digest,
        adapter=source.adapter,
        adapter_digest=source.adapter_digest,
        exit_layer=source.exit_layer,
        exit_vocab=source.exit_vocab,
        dtype=source.dtype,
        exit_cost=source.exit_cost,
        trace=rows.name,
        trace_sha256=digest(path),
    )
    calibration = Calibration(measure.confidence, measure.temperature, table, bound)
    file = OperatingPoints("", identity, points, calibration)
    return Fitted(file, fitted, certificates, refused)


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _exact(choose: TraceRows, rest: TraceRows, measure: Measure) -> Point:
    """Lossless; λ is the fastest by replay at the measured stage costs."""
    confidence = measure.of(choose)
    tried = [
        replay_trace(choose, confidence, AcceptMode.EXACT, threshold, cap=MAX_STACK)
        for threshold in _THRESHOLDS
    ]
    threshold = max(tried, key=lambda p: p.speedup).threshold
    compute = measure.policy(
        operating_point="exact", mode=AcceptMode.EXACT, policy=PolicyName.THRESHOLD,
        exit_threshold=threshold,
    )  # fmt: skip
    return Point(compute, _measured(rest, measure, AcceptMode.EXACT, threshold))


def _balanced(
    choose: TraceRows, rest: TraceRows, measure: Measure, delta: float, found: Certificate | None
) -> Point:
    """At most delta of the tokens differ, by certificate; by measurement where there is none."""
    fields: dict[str, object] = {"policy": PolicyName.RISK, "risk": delta}
    note = ""
    if found is not None:
        threshold = found.threshold
        fields["risk_confidence"] = 1 - found.epsilon
    else:
        threshold = _at_agreement(choose, measure.of(choose), 1 - delta)
        fields = {"policy": PolicyName.THRESHOLD}
        note = f"no promise: the trace is too small to certify a risk of {delta:g}"
    compute = measure.policy(
        operating_point="balanced", mode=AcceptMode.FREE, exit_threshold=threshold, **fields
    )
    return Point(compute, _measured(rest, measure, AcceptMode.FREE, threshold), note)


def _fast(choose: TraceRows, rest: TraceRows, measure: Measure, agreement: float) -> Point:
    """The least budget under which so many tokens are the full model's."""
    exit_cost = choose.source.exit_cost
    smallest = 1 - most_exits(ComputePolicy(max_stack=MAX_STACK)) * (1 - exit_cost)
    low, high = math.ceil(100 * smallest), 100  # hundredths; quality rises with the budget
    while low < high:
        middle = (low + high) // 2
        first = first_threshold(choose, measure, middle / 100)
        exits = live_exits(choose, measure, middle / 100, first=first)
        if outcome(choose, exits).quality >= agreement:
            high = middle
        else:
            low = middle + 1
    budget = high / 100
    first = first_threshold(choose, measure, budget)
    compute = measure.policy(
        operating_point="fast", mode=AcceptMode.FREE, policy=PolicyName.BUDGET, budget=budget,
        exit_threshold=first,
    )  # fmt: skip
    exits = live_exits(rest, measure, budget, first=first)
    return Point(compute, {**_measured(rest, measure, AcceptMode.FREE, first), **_of(rest, exits)})


def _at_agreement(rows: TraceRows, confidence: Floats, agreement: float) -> float:
    """The lowest λ at which so many tokens are the full model's; 1 if none is."""
    thresholds = grid()
    wrong = np.array([(~rows.agrees & (confidence > t)).mean() for t in thresholds])
    fine = np.flatnonzero(wrong <= 1 - agreement)
    return float(thresholds[fine[-1]]) if len(fine) else 1.0


def _measured(
    rows: TraceRows, measure: Measure, mode: AcceptMode, threshold: float
) -> dict[str, float]:
    """Figures of held-out requests. The speed-up is a replay of one sequence at a time."""
    confidence = measure.of(rows)
    predicted = replay_trace(rows, confidence, mode, threshold, cap=MAX_STACK)
    figures = {
        "agreement": 1 - predicted.wrong,
        "exit_rate": predicted.exits,
        "budget": 1 - predicted.exits * (1 - rows.source.exit_cost),
        "predicted_speedup": predicted.speedup,
        "held_out_requests": rows.num_requests,
        "held_out_rows": len(rows),
    }
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in figures.items()}


def _of(rows: TraceRows, exits: Bools) -> dict[str, float]:
    found = outcome(rows, exits)
    return {
        "agreement": round(found.quality, 4),
        "exit_rate": round(float(exits.mean()), 4),
        "budget": round(found.realised, 4),
    }
