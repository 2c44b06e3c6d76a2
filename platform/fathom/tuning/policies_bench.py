"""``fathom bench policies``: every promise of the exit policies, tested on held-out requests."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from fathom.engine.costs import StageCosts
from fathom.exits.bias import Method, View
from fathom.exits.observed import HALF_LIFE
from fathom.exits.p_values import Bound
from fathom.exits.risk import losses
from fathom.tuning.adaptive_replay import mixed, probing, replicas, switch
from fathom.tuning.budget_replay import first_threshold, live_exits, outcome, spend, targets
from fathom.tuning.overhead import measure_overhead
from fathom.tuning.risk_replay import check_elsewhere, check_splits
from fathom.tuning.rows import Measure, TraceRows

DELTAS = (0.02, 0.05, 0.1)
EPSILON = 0.1

Progress = Callable[[str], None]


def bench(
    rows: TraceRows,
    shifted: TraceRows | None,
    measure: Measure,
    *,
    costs: StageCosts,
    seeds: Sequence[int] = (0, 1, 2),
    splits: int = 200,
    progress: Progress = lambda label: None,
) -> dict[str, Any]:
    """All parts of the report.

    Args:
        rows: of one workload; shifted: of another one, for what happens when traffic changes.
        costs: measured seconds of the stages' passes, for the overhead.
        seeds: of the splits into calibration and held-out requests.
        splits: for the policy ``risk``.
    """
    report: dict[str, Any] = {"budget": budget_rows(rows, measure, seeds, progress)}
    table = losses(measure.of(rows), rows.agrees, rows.groups)
    for key, bound in (("risk", Bound.HOEFFDING_BENTKUS), ("risk_betting", Bound.BETTING)):
        progress(f"risk, {bound.value}")
        report[key] = [
            dataclasses.asdict(check_splits(table, delta, EPSILON, bound=bound, splits=splits))
            for delta in DELTAS
        ]
    progress("adaptive")
    report["adaptive"] = adaptive(rows, shifted, measure)
    if shifted is not None:
        progress("shift")
        report["shift"] = {
            "budget": shifted_budgets(rows, shifted, measure),
            "risk": [
                None if (found := check_elsewhere(table, shifted, measure, delta, EPSILON)) is None
                else _elsewhere(dataclasses.asdict(found))
                for delta in DELTAS
            ],
        }  # fmt: skip
    progress("overhead")
    overhead = measure_overhead(rows, measure, costs)
    report["overhead"] = {
        **dataclasses.asdict(overhead),
        "percent": overhead.percent,
        "worst_percent": overhead.worst_percent,
    }
    report["overhead_percent"] = max(overhead.worst_percent.values())
    return report


def budget_rows(
    rows: TraceRows, measure: Measure, seeds: Sequence[int], progress: Progress
) -> list[dict[str, Any]]:
    """For each budget the policy and the baselines: means over the seeds, and each seed's own."""
    found = []
    parts = [rows.halves(seed) for seed in seeds]
    for target in targets(rows.source.exit_cost):
        progress(f"budget {target:g}")
        runs = [
            spend(*halves, measure, target, seed) for halves, seed in zip(parts, seeds, strict=True)
        ]
        mean = {
            way: {
                "realised": statistics.fmean(run[way].realised for run in runs),
                "quality": statistics.fmean(run[way].quality for run in runs),
            }
            for way in runs[0]
        }
        live = mean.pop("live")
        found.append(
            {
                "target": target,
                **live,
                "realised_by_seed": [run["live"].realised for run in runs],
                "quality_by_seed": [run["live"].quality for run in runs],
                "baselines": mean,
            }
        )
    return found


def shifted_budgets(
    rows: TraceRows, shifted: TraceRows, measure: Measure
) -> list[dict[str, float]]:
    """Thresholds from one workload on another: fixed, and as the policy follows it."""
    found = []
    for target in targets(rows.source.exit_cost):
        first = first_threshold(rows, measure, target)
        fixed = outcome(shifted, measure.of(shifted) > first)
        live = outcome(shifted, live_exits(shifted, measure, target, first=first))
        found.append({"target": target, "fixed": fixed.realised, "live": live.realised})
    return found


def adaptive(rows: TraceRows, shifted: TraceRows | None, measure: Measure) -> dict[str, Any]:
    """λ across a switch of workloads, with and without probes, and over replicas."""
    report: dict[str, Any] = {
        "probes": [
            dataclasses.asdict(probing(each, measure, view, method))
            for each in (rows, *([] if shifted is None else [shifted]))
            for method in Method
            for view in (View.STACKS, View.STAYED, View.WEIGHTED, View.LATENT)
        ]
    }
    if shifted is not None:
        report["switches"] = [
            {"from": a.name, "to": b.name, **dataclasses.asdict(switch(a, b, measure, method))}
            for method in Method
            for a, b in ((rows, shifted), (shifted, rows))
        ]
        traffic = mixed(rows, shifted, measure)
        values = (measure, traffic.confidence, traffic.agrees)
        report["replicas"] = [
            dataclasses.asdict(replicas(*values, owner, halves=halves, half_life=HALF_LIFE))
            for halves, owner in (
                ("by request", traffic.groups % 2 == 1),
                ("by workload", traffic.second),
            )
        ]
    return report


def _elsewhere(values: dict[str, Any]) -> dict[str, Any]:
    certificate = values.pop("certificate")
    return {"delta": certificate["delta"], "threshold": certificate["threshold"], **values}
