"""What an exit policy costs beside the decode step that it decides in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fathom.compute import ComputePolicy, Confidence, PolicyName
from fathom.engine.confidences import ExitRows, confidences
from fathom.engine.costs import StageCosts
from fathom.engine.random import Draw, uniform
from fathom.exits.live import LivePolicies
from fathom.exits.policy import exits
from fathom.tuning.rows import Measure, Source, TraceRows

_ROWS = 4096
_REPEATS = 5

POLICIES = {
    PolicyName.THRESHOLD: ComputePolicy(),
    PolicyName.ADAPTIVE: ComputePolicy(policy=PolicyName.ADAPTIVE),
    PolicyName.BUDGET: ComputePolicy(policy=PolicyName.BUDGET, budget=0.6),
    PolicyName.RISK: ComputePolicy(policy=PolicyName.RISK, risk=0.05, exit_threshold=0.6),
}


@dataclass(frozen=True, slots=True)
class Overhead:
    """Microseconds a token, on this machine now, beside measured decode steps.

    Attributes:
        confidence: the measure that the policies use.
        policy_us: threshold, decision, probe draw and what is noted of the row, by policy: the
            mean over rows. worst_us: of the row that takes the longest, its shortest time of
            several runs, so that what else the machine does is left out.
        confidence_us: of one row of exit logits, by measure; ``saturation`` of two states too.
        draft_step_ms: one row through the shallow stage and its head: the cheapest decode step.
        full_step_ms: one row through the whole model.
    """

    confidence: str
    policy_us: dict[str, float]
    worst_us: dict[str, float]
    confidence_us: dict[str, float]
    draft_step_ms: float
    full_step_ms: float

    @property
    def percent(self) -> dict[str, float]:
        """Of a draft step, by policy, with what the measure costs."""
        return self._share(self.policy_us)

    @property
    def worst_percent(self) -> dict[str, float]:
        """The same of the row that takes the longest."""
        return self._share(self.worst_us)

    def _share(self, policy_us: dict[str, float]) -> dict[str, float]:
        asked = self.confidence_us[self.confidence]
        return {
            name: 100 * (us + asked) / 1e3 / self.draft_step_ms for name, us in policy_us.items()
        }


def measure_overhead(
    rows: TraceRows, measure: Measure, costs: StageCosts, *, hidden_size: int = 576
) -> Overhead:
    """Time the engine's own policy code over rows of a trace, one at a time.

    Args:
        rows: to decide, the first few thousand. costs: measured seconds of the stages.
        hidden_size: of states made up for ``saturation``.
    """
    source = rows.source
    decided = list(
        zip(measure.of(rows)[:_ROWS].tolist(), rows.agrees[:_ROWS].tolist(), strict=True)
    )
    row_us = {name.value: _row_us(source, each, decided) for name, each in POLICIES.items()}
    dtype = getattr(torch, source.dtype)
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, source.exit_vocab, generator=random)
    states = torch.randn(2, 1, hidden_size, generator=random)
    row = ExitRows(logits.to(dtype), states[0].to(dtype), states[1].to(dtype))
    confidence_us = {}
    for each in Confidence:
        if each is Confidence.META:
            continue  # a classifier of its own; the ledger has its multiply-adds
        compute = [ComputePolicy(confidence=each)]

        def ask(compute: list[ComputePolicy] = compute) -> None:
            for _ in range(200):
                confidences(compute, row)

        confidence_us[each.value] = _us(ask) / 200
    return Overhead(
        confidence=measure.confidence.value,
        policy_us={name: statistics.fmean(us) for name, us in row_us.items()},
        worst_us={name: max(us) for name, us in row_us.items()},
        confidence_us=confidence_us,
        draft_step_ms=costs.shallow(1) * 1e3,
        full_step_ms=(costs.shallow_full(1) + costs.deep(1)) * 1e3,
    )


def _row_us(source: Source, compute: ComputePolicy, rows: list[tuple[float, bool]]) -> list[float]:
    """Microseconds of each row: the shortest of several runs, which do the same at each."""
    runs = [_decide(source, compute, rows) for _ in range(_REPEATS)]
    return [1e6 * min(row) for row in zip(*runs, strict=True)]


def _decide(source: Source, compute: ComputePolicy, rows: list[tuple[float, bool]]) -> list[float]:
    policies = LivePolicies(source.exit_cost)
    gone = 0
    seconds = []
    for place, (confidence, agrees) in enumerate(rows):
        start = time.perf_counter()
        threshold = policies.threshold_for(compute, gone, place)
        leaves = exits(compute, confidence, threshold=threshold)
        if leaves and (rate := compute.probes):
            leaves = uniform(7, place, 0, Draw.PROBE) >= rate
        gone += leaves
        policies.observe(compute, confidence, agrees)
        seconds.append(time.perf_counter() - start)
    return seconds


def _us(run: Callable[[], None]) -> float:
    """Microseconds by the clock that steps are timed by, the median of runs after a warm-up."""
    run()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6
