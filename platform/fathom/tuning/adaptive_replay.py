"""Policy ``adaptive`` replayed: a switch of data sets, probes, and replicas that share counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fathom.compute import ComputePolicy, PolicyName
from fathom.exits.beta_mixture import GRID, fit_em, fit_moments
from fathom.exits.bias import Method, View, replay
from fathom.exits.histogram import ConfidenceHistogram
from fathom.exits.live import LivePolicies
from fathom.tuning.rows import Bools, Floats, Integers, Measure, TraceRows

STEP = float(GRID[1] - GRID[0])
"""Of λ's grid."""

PROBE_RATE = 0.02
SETTLED_ROWS = 500


def oracle(
    confidence: Floats, agrees: Bools, method: Method, *, half_life: float | None = None
) -> float:
    """λ of the estimator if it knows every row of a workload.

    Args:
        half_life: in rows; None weighs all the same.
    """
    histogram = ConfidenceHistogram(half_life=half_life)
    histogram.add(confidence, agrees)
    return (fit_em if method is Method.EM else fit_moments)(histogram).threshold()


def live_thresholds(measure: Measure, confidence: Floats, agrees: Bools, method: Method) -> Floats:
    """λ that each row meets under policy ``adaptive`` as an engine runs it, [n]."""
    compute = measure.policy(policy=PolicyName.ADAPTIVE)
    policies = LivePolicies(0.5, estimator=method.value)
    found = np.empty(len(confidence))
    for row, (c, y) in enumerate(zip(confidence.tolist(), agrees.tolist(), strict=True)):
        found[row] = _threshold(policies, compute)
        policies.observe(compute, c, y)
    return found


@dataclass(frozen=True, slots=True)
class Switch:
    """λ across a switch from one workload to another.

    Attributes:
        before, after: median λ of the latter half of each part. oracle_before, oracle_after: λ of
            the estimator that knows the whole part. step: of the grid.
        settled_after: rows from the switch until λ is first within a step of ``after``.
        within: share of the rows behind the 500th after the switch at which it is.
    """

    method: str
    before: float
    after: float
    oracle_before: float
    oracle_after: float
    step: float
    settled_after: int | None
    within: float


def switch(first: TraceRows, second: TraceRows, measure: Measure, method: Method) -> Switch:
    """Replay ``first``, then ``second``, without a word of the switch between them.

    In the modes that verify exits every row is flushed, so rows are flushed tokens here.
    """
    parts = [(measure.of(rows), rows.agrees) for rows in (first, second)]
    confidence = np.concatenate([c for c, _ in parts])
    agrees = np.concatenate([y for _, y in parts])
    thresholds = live_thresholds(measure, confidence, agrees, method)
    before, after = thresholds[: len(first)], thresholds[len(first) :]
    ends = [float(np.median(part[len(part) // 2 :])) for part in (before, after)]
    near = np.abs(after - ends[1]) <= STEP + 1e-9
    later = near[SETTLED_ROWS:]
    return Switch(
        method=method.value,
        before=ends[0],
        after=ends[1],
        oracle_before=oracle(*parts[0], method),
        oracle_after=oracle(*parts[1], method),
        step=STEP,
        settled_after=int(near.argmax()) if near.any() else None,
        within=float(later.mean()) if len(later) else float("nan"),
    )


@dataclass(frozen=True, slots=True)
class Probing:
    """What λ is learned where nothing verifies exits, as in mode ``copy``.

    Attributes:
        view: which rows the estimator sees (``fathom.exits.bias.View``).
        threshold: λ, mean over the latter half of the rows; spread: its standard deviation there.
        oracle: λ of the estimator that sees every row. error: mean |λ - oracle| there.
        labelled: share of rows whose verdict was learned. exits: share of rows that left.
        risk: share of rows that left and were wrong.
    """

    view: str
    method: str
    probe_rate: float
    threshold: float
    spread: float
    oracle: float
    error: float
    labelled: float
    exits: float
    risk: float


def probing(
    rows: TraceRows, measure: Measure, view: View, method: Method, *, half_life: float | None = None
) -> Probing:
    """Replay a trace through what one kind of system sees."""
    # One sequence after the other, as stacks are found.
    rows = rows.select(np.lexsort((rows.position, rows.groups)))
    confidence = measure.of(rows)
    found = replay(
        confidence, rows.agrees, rows.groups,
        view=view, method=method, probe_rate=PROBE_RATE, half_life=half_life,
    )  # fmt: skip
    half = slice(len(rows) // 2, None)
    thresholds, exits = found.thresholds[half], found.exits[half]
    best = oracle(confidence, rows.agrees, method)
    return Probing(
        view=view.value,
        method=method.value,
        probe_rate=PROBE_RATE if view in (View.LATENT, View.WEIGHTED) else 0.0,
        threshold=float(thresholds.mean()),
        spread=float(thresholds.std()),
        oracle=best,
        error=float(np.abs(thresholds - best).mean()),
        labelled=float(found.labelled[half].mean()),
        exits=float(exits.mean()),
        risk=float((exits & ~rows.agrees[half]).mean()),
    )


@dataclass(frozen=True, slots=True)
class Replicas:
    """Two replicas that see different halves of the traffic, beside one that sees it all.

    Attributes:
        halves: what each half is. every: rows of all the traffic between two exchanges.
        alone, merged: mean |λ - that of the one that sees all| over both replicas and all rows
            from the first exchange on, without exchanges and with them. alone_within,
            merged_within: share of them within a step of the grid.
        alone_final, merged_final, whole_final: λ at the end.
    """

    halves: str
    every: int
    alone: float
    merged: float
    alone_within: float
    merged_within: float
    alone_final: tuple[float, float]
    merged_final: tuple[float, float]
    whole_final: float


def replicas(
    measure: Measure,
    confidence: Floats,
    agrees: Bools,
    owner: Bools,
    *,
    halves: str,
    half_life: float,
    every: int = 256,
) -> Replicas:
    """Replay traffic over two replicas.

    Args:
        confidence, agrees: [n] of all the traffic. owner: [n] which replica sees the row.
        half_life: in rows of each replica's own; the one that sees all counts twice as many in the
            same time, and remembers as much with twice the half-life.
    """
    compute = measure.policy(policy=PolicyName.ADAPTIVE)
    alone = [LivePolicies(0.5, half_life=half_life) for _ in range(2)]
    merged = [LivePolicies(0.5, half_life=half_life) for _ in range(2)]
    whole = LivePolicies(0.5, half_life=2 * half_life)
    found: list[tuple[float, ...]] = []
    values = zip(confidence.tolist(), agrees.tolist(), owner.tolist(), strict=True)
    for row, (c, y, place) in enumerate(values):
        if row and row % every == 0:
            told = [each.snapshot() for each in merged]
            merged[0].merge([told[1]])
            merged[1].merge([told[0]])
        for policies in (alone[place], merged[place], whole):
            policies.observe(compute, c, y)
        if row >= every:
            found.append(tuple(_threshold(each, compute) for each in (*alone, *merged, whole)))
    table = np.array(found)
    distance = np.abs(table[:, :4] - table[:, 4:])
    within = distance <= STEP + 1e-9
    last = table[-1].tolist()
    return Replicas(
        halves=halves,
        every=every,
        alone=float(distance[:, :2].mean()),
        merged=float(distance[:, 2:].mean()),
        alone_within=float(within[:, :2].mean()),
        merged_within=float(within[:, 2:].mean()),
        alone_final=(last[0], last[1]),
        merged_final=(last[2], last[3]),
        whole_final=last[4],
    )


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Two workloads at once: confidence, agrees, request, and which of the two, each [n]."""

    confidence: Floats
    agrees: Bools
    groups: Integers
    second: Bools


def mixed(first: TraceRows, second: TraceRows, measure: Measure) -> Traffic:
    """Merge two traces so that both run from the first row to the last."""
    parts = (first, second)
    due = np.concatenate([np.arange(len(rows)) / len(rows) for rows in parts])
    order = np.argsort(due, kind="stable")
    return Traffic(
        confidence=np.concatenate([measure.of(rows) for rows in parts])[order],
        agrees=np.concatenate([rows.agrees for rows in parts])[order],
        groups=np.concatenate([first.groups, second.groups + first.groups.max() + 1])[order],
        second=(np.arange(len(due)) >= len(first))[order],
    )


def _threshold(policies: LivePolicies, compute: ComputePolicy) -> float:
    found = policies.threshold_for(compute, 0, 0)
    return compute.threshold if found is None else found
