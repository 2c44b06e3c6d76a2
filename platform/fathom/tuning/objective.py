"""What a setting is worth: replayed on traces, at the costs that were measured with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fathom.compute import AcceptMode, ComputePolicy, PolicyName
from fathom.engine.drafting import FREE_TO_PAUSE, DraftRule
from fathom.exits.bias import Method
from fathom.exits.live import LivePolicies
from fathom.tuning.adaptive_replay import live_thresholds
from fathom.tuning.budget_replay import first_threshold, live_exits
from fathom.tuning.replay import replay
from fathom.tuning.rows import Bools, Measure, TraceRows
from fathom.tuning.study import Objective, Study
from fathom.tuning.study_live import ONLY


@dataclass(frozen=True, slots=True)
class Figures:
    """What a setting gives, mean over the data sets.

    Attributes:
        quality: share of the output's tokens that are the full model's, in its own contexts.
        budget: mean cost of a token by the depth at which it was decided, as a share of a full
            one's; what verifying costs is in ``tpot_ms``.
        tpot_ms: predicted time per output token, one sequence at a time. full_tpot_ms: of ``full``.
        exit_rate: share of the output's tokens that were decided at the exit.
        tokens_per_s: of all requests together; in a replay, of one sequence after its prompt.
            full_tokens_per_s: of ``full``.
    """

    quality: float
    budget: float
    tpot_ms: float
    full_tpot_ms: float
    exit_rate: float
    tokens_per_s: float = 0.0
    full_tokens_per_s: float = 0.0

    def losses(self, study: Study) -> list[float]:
        """[objectives] to be made small: quality lost, budget, and tpot beside that of ``full``."""
        values = {
            Objective.QUALITY: 1 - self.quality,
            Objective.BUDGET: self.budget,
            Objective.TPOT: self.tpot_ms / self.full_tpot_ms,
        }
        if Objective.THROUGHPUT in study.objectives:
            values[Objective.THROUGHPUT] = self.full_tokens_per_s / self.tokens_per_s
        return [values[Objective(name)] for name in study.objectives]

    def violations(self, study: Study) -> dict[str, float]:
        """By how much each constraint is missed; at most 0 where it is kept."""
        own = study.constraints
        found = {}
        if own.max_quality_loss is not None:
            found["max_quality_loss"] = 1 - self.quality - own.max_quality_loss
        if own.max_tpot_ms is not None:
            found["max_tpot_ms"] = self.tpot_ms - own.max_tpot_ms
        return found


def reference(study: Study) -> list[float]:
    """[objectives] from which hypervolumes are measured: the most loss allowed, and mode ``full``.

    Losses are shares, so that one box serves all models.
    """
    most = study.constraints.max_quality_loss
    worst = {Objective.QUALITY: 1.0 if most is None else most}
    return [worst.get(Objective(name), 1.0) for name in study.objectives]


def compute_of(setting: Mapping[str, Any], exit_cost: float) -> ComputePolicy:
    """The compute policy of a setting; what it says of the engine is left out.

    A budget below what the stack's cap allows is raised to the least that can be asked for: the
    space need not know how the two depend on each other.
    """
    own = ComputePolicy.__dataclass_fields__
    compute = ComputePolicy(**{name: value for name, value in setting.items() if name in own})
    if compute.policy is PolicyName.BUDGET:
        assert compute.budget is not None
        least = math.ceil(1e4 * LivePolicies(exit_cost).least_budget(compute)) / 1e4
        compute = replace(compute, budget=max(compute.budget, least))
    compute.validate()
    return compute


def evaluate(setting: Mapping[str, Any], parts: Sequence[tuple[TraceRows, TraceRows]]) -> Figures:
    """Replay a setting on the rows of its exit.

    Args:
        parts: by data set, the rows that a budget's first λ comes from, and those that count; of
            all the study's exits.
    """
    exit_name = setting.get("exit", ONLY)
    return mean_figures(
        [_figures(setting, first, rows) for first, rows in parts if rows.exit == exit_name]
    )


def mean_figures(found: Sequence[Figures]) -> Figures:
    """The mean of several data sets' figures, each of the same weight."""
    names = Figures.__dataclass_fields__
    table = np.array([[asdict(each)[name] for name in names] for each in found])
    return Figures(**dict(zip(names, table.mean(axis=0).tolist(), strict=True)))


def _figures(setting: Mapping[str, Any], first: TraceRows, rows: TraceRows) -> Figures:
    source = rows.source
    compute = compute_of(setting, source.exit_cost)
    # One request after the other, as it is predicted and run live: what policies learn of one, and
    # carry on from it, the next one meets. Traces are recorded of many at once.
    rows = rows.select(np.lexsort((rows.position, rows.groups)))
    leaves = _leaves(compute, first, rows)
    pauses = setting.get("pause_drafting", True) and compute.policy in FREE_TO_PAUSE
    agrees = rows.agrees.tolist()
    found = replay(
        leaves.astype(float).tolist(),  # sure or not: λ was applied row by row
        agrees,
        agrees,  # of the modes that hold drafts, exact alone is here: it keeps what agrees
        [*(np.flatnonzero(np.diff(rows.groups)) + 1).tolist(), len(rows)],
        source.costs,
        compute.mode,
        0.5,
        cap=compute.max_stack,
        rule=DraftRule(source.costs, all_stand=compute.mode is AcceptMode.FREE) if pauses else None,
    )
    full_ms = 1e3 * (source.costs.shallow_full(1) + source.costs.deep(1))
    return Figures(
        quality=1.0 if compute.mode is AcceptMode.EXACT else 1 - found.wrong,
        budget=1 - found.exits * (1 - source.exit_cost),
        tpot_ms=full_ms / found.speedup,
        full_tpot_ms=full_ms,
        exit_rate=found.exits,
        tokens_per_s=1e3 * found.speedup / full_ms,
        full_tokens_per_s=1e3 / full_ms,
    )


def with_first_threshold(compute: ComputePolicy, rows: TraceRows) -> ComputePolicy:
    """A policy ``budget`` with the λ that it has until it has seen enough; others as they are."""
    if compute.budget is None or compute.exit_threshold is not None:
        return compute
    measure = Measure(compute.confidence, compute.exit_temperature)
    return replace(compute, exit_threshold=first_threshold(rows, measure, compute.budget))


def _leaves(compute: ComputePolicy, first: TraceRows, rows: TraceRows) -> Bools:
    """[n] rows that would leave by the policy alone."""
    measure = Measure(compute.confidence, compute.exit_temperature)
    if compute.policy is PolicyName.BUDGET:
        assert compute.budget is not None
        start = first_threshold(first, measure, compute.budget)
        return live_exits(
            rows,
            measure,
            compute.budget,
            first=start,
            max_stack=compute.max_stack,
            mode=compute.mode,
        )
    confidence = measure.of(rows)
    if compute.policy is PolicyName.ADAPTIVE:
        thresholds, _ = live_thresholds(measure, confidence, rows.agrees, Method.EM)
        probed = np.random.default_rng(0).random(len(rows)) < compute.probes
        return np.asarray((confidence > thresholds) & ~probed)
    return np.asarray(confidence > compute.threshold)


def first_rows(rows: TraceRows, count: int) -> TraceRows:
    """Whole requests from the start, until there are so many rows; all of them for 0."""
    if not count or len(rows) <= count:
        return rows
    names, index, sizes = np.unique(rows.groups, return_index=True, return_counts=True)
    order = np.argsort(index)
    enough = int(np.searchsorted(sizes[order].cumsum(), count)) + 1
    return rows.select(np.isin(rows.groups, names[order][:enough]))
