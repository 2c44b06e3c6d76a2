"""Policy ``adaptive`` replayed: a switch of data sets, probes, and replicas that share counts."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from fathom.compute import ComputePolicy, PolicyName
from fathom.exits.beta_mixture import GRID, START, Beta, BetaMixture, fit_em, fit_moments
from fathom.exits.bias import Method, View, replay
from fathom.exits.histogram import ConfidenceHistogram
from fathom.exits.live import LivePolicies
from fathom.exits.observed import HALF_LIFE, REFIT
from fathom.tuning.rows import Bools, Floats, Integers, Measure, TraceRows

STEP = float(GRID[1] - GRID[0])
"""Of λ's grid."""

FINE: Floats = np.linspace(0, 1, 101)
PROBE_RATE = 0.02
SETTLED_ROWS = 500


def oracle(confidence: Floats, agrees: Bools, method: Method, grid: Floats = GRID) -> float:
    """λ of the estimator if it knows every row of a workload."""
    histogram = ConfidenceHistogram()
    histogram.add(confidence, agrees)
    return (fit_em if method is Method.EM else fit_moments)(histogram).threshold(grid=grid)


def live_thresholds(
    measure: Measure,
    confidence: Floats,
    agrees: Bools,
    method: Method,
    half_life: float = HALF_LIFE,
) -> tuple[Floats, Floats]:
    """λ that each row meets under policy ``adaptive`` as an engine runs it.

    Returns:
        λ [n]; and λ of the same fits on ``FINE`` [n], which shows what the grid hides.
    """
    compute = measure.policy(policy=PolicyName.ADAPTIVE)
    policies = LivePolicies(0.5, estimator=method.value, half_life=half_life)
    found, fine = np.empty(len(confidence)), np.empty(len(confidence))
    for row, (c, y) in enumerate(zip(confidence.tolist(), agrees.tolist(), strict=True)):
        found[row] = _threshold(policies, compute)
        if row % REFIT == 0:
            now = _fine(policies)
        fine[row] = now
        policies.observe(compute, c, y)
    return found, fine


def _fine(policies: LivePolicies) -> float:
    (state,) = policies.snapshot()["measures"].values()
    mixture = state["mixture"]
    if mixture is None:
        return START
    parts = {name: Beta(**mixture[name]) for name in ("agrees", "disagrees")}
    return BetaMixture(**{**mixture, **parts}).threshold(grid=FINE)


@dataclass(frozen=True, slots=True)
class Settling:
    """λ across switches of workloads.

    Attributes:
        before, after: median λ of the latter half of each workload's rows. oracle_before,
            oracle_after: λ of the estimator that knows all of them.
        settled_after: rows from a switch until λ is first within a step of ``after``: the median
            over the switches, and settled_worst the most; None where one never settled.
        settled_in_time: share of the switches that settled within 500 rows.
        near: share of the rows of the second workload, alone, at which λ is within a step of
            ``after``: what the estimator's noise leaves.
    """

    before: float
    after: float
    oracle_before: float
    oracle_after: float
    settled_after: float | None
    settled_worst: int | None
    settled_in_time: float
    near: float


@dataclass(frozen=True, slots=True)
class Switch:
    """Switches from one workload to another, at several places.

    Attributes:
        step: of the grid, which λ may differ by and count as settled. grid: λ as policy
            ``adaptive`` takes it, on FREE's grid. fine: λ of the same fits on a grid of 0.01 over
            [0, 1], which moves where the other one stands at an end.
    """

    method: str
    switches: int
    step: float
    grid: Settling
    fine: Settling


def switch(
    first: TraceRows,
    second: TraceRows,
    measure: Measure,
    method: Method,
    *,
    half_life: float = HALF_LIFE,
    switches: int = 20,
    rows: int = 2000,
) -> Switch:
    """Replay ``rows`` rows of ``first``, then as many of ``second``, without a word of the switch.

    In the modes that verify exits every row is flushed, so rows are flushed tokens here.

    Args:
        switches: how often, each from another place of both traces.
    """
    parts = [(measure.of(each), each.agrees) for each in (first, second)]
    alone = [live_thresholds(measure, *part, method, half_life) for part in parts]
    after: list[tuple[Floats, Floats]] = []
    for number in range(switches):
        pieces = []
        for confidence, agrees in parts:
            start = round((len(confidence) - min(rows, len(confidence))) * number / switches)
            pieces.append((confidence[start : start + rows], agrees[start : start + rows]))
        (c0, y0), (c1, y1) = pieces
        both = np.concatenate([c0, c1]), np.concatenate([y0, y1])
        grid, fine = live_thresholds(measure, *both, method, half_life)
        after.append((grid[len(c0) :], fine[len(c0) :]))
    settlings = [
        _settling(
            (alone[0][place], alone[1][place]),
            [oracle(*part, method, values) for part in parts],
            [each[place] for each in after],
        )
        for place, values in enumerate((GRID, FINE))
    ]
    return Switch(method.value, switches, STEP, *settlings)


def _settling(
    alone: tuple[Floats, Floats], oracles: list[float], switched: list[Floats]
) -> Settling:
    ends = [float(np.median(part[len(part) // 2 :])) for part in alone]
    tolerance = STEP + 1e-9
    settled = []
    for thresholds in switched:
        near = np.abs(thresholds - ends[1]) <= tolerance
        settled.append(int(near.argmax()) if near.any() else None)
    known = [rows for rows in settled if rows is not None]
    never = len(known) < len(settled)
    return Settling(
        before=ends[0],
        after=ends[1],
        oracle_before=oracles[0],
        oracle_after=oracles[1],
        settled_after=statistics.median(known) if known else None,
        settled_worst=None if never else max(known),
        settled_in_time=sum(rows <= SETTLED_ROWS for rows in known) / len(settled),
        near=float((np.abs(alone[1] - ends[1]) <= tolerance)[SETTLED_ROWS:].mean()),
    )


@dataclass(frozen=True, slots=True)
class Probing:
    """What λ is learned where nothing verifies exits, as in mode ``copy``.

    Attributes:
        trace: of which workload.
        view: which rows the estimator sees (``fathom.exits.bias.View``).
        threshold: λ, mean over the latter half of the rows; spread: its standard deviation there.
        oracle: λ of the estimator that sees every row. error: mean |λ - oracle| there.
        labelled: share of rows whose verdict was learned. exits: share of rows that left.
        risk: share of rows that left and were wrong.
    """

    trace: str
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
        trace=rows.name,
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
