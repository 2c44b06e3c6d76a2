"""The methods of the comparison, with thresholds that a trace of other requests has chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from experiments.commands import fathom, record_trace
from experiments.free.tasks import FreeTask, write_prompts
from fathom.exits.risk import TooLittleData
from fathom.tuning.operating_points import OperatingPoints, load
from fathom.tuning.studies import NoPoint, pick
from fathom.types import AcceptMode, ComputePolicy, PolicyName

PAPER = 0.9
"""λ of CALM in FREE's comparison, and FREE's first one."""

AGREEMENTS = (0.95, 0.9)
"""That a fixed λ is chosen for, on the trace."""

RISK, RISK_CONFIDENCE = 0.05, 0.9

FULL = ComputePolicy(mode=AcceptMode.FULL)


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table.

    Attributes:
        family: by which figures colour it.
        promised: agreement with the full model that the trace foretells or certifies; None where
            nothing does.
    """

    name: str
    label: str
    family: str
    compute: ComputePolicy
    promised: float | None = None


@dataclass(frozen=True, slots=True)
class Methods:
    """All methods of a task, full depth first. missing: why a method is not among them, by name."""

    methods: tuple[Method, ...]
    missing: dict[str, str]


def record(own: FreeTask, folder: Path, threads: int) -> Path:
    """The trace of the requests that choose, at full depth; recorded if it is not there.

    Raises:
        SystemExit: if ``fathom generate`` fails; it has said why.
    """
    trace, prompts = folder / "trace.parquet", folder / "prompts.jsonl"
    if not trace.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_prompts(own, prompts)
        record_trace(
            prompts, trace, "--adapter", own.adapter, "--new-tokens", own.new_tokens,
            "--max-num-seqs", 16, "--threads", threads,
        )  # fmt: skip
    return trace


def calibrate(own: FreeTask, folder: Path, trace: Path, store: str) -> Methods:
    """Choose thresholds: certificates by `fathom calibrate fit`, fixed λ by `fathom tune`.

    Args:
        folder: of the task. store: MLflow's URI, for the study.

    Raises:
        SystemExit: if a command fails; it has said why.
    """
    certified = folder / "certified.yaml"
    if not certified.exists():
        fathom("calibrate", "fit", trace, "--risk", RISK, "--out", certified)
    study, work = folder / f"free-{own.name}.yaml", folder / "study"
    if not (work / "points.yaml").exists():
        study.write_text(yaml.safe_dump(_study(trace)))
        fathom("tune", study, "--work-dir", work, "--mlflow", store)
    return choose(load(certified), load(work / "points.yaml"))


def choose(certified: OperatingPoints, searched: OperatingPoints) -> Methods:
    """The methods.

    Args:
        certified: of `fathom calibrate fit`: the point exact, and a table for risks and budgets.
        searched: of `fathom tune`: fixed λ in mode free, with their measured agreement.
    """
    exact = certified.points["exact"].compute
    found = [
        Method("full", "full model", "full", FULL, 1.0),
        Method("exact", f"exact, λ = {exact.threshold:.2f}", "exact", exact, 1.0),
        Method("static", "static exit", "static", _copy(PolicyName.ALWAYS)),
        Method("calm-paper", f"CALM, λ = {PAPER}", "CALM", _copy(threshold=PAPER)),
    ]
    free = [Method("free-paper", f"FREE, λ = {PAPER}", "FREE fixed", _free(threshold=PAPER))]
    missing = {}
    costs = []
    for agreement in AGREEMENTS:
        name = f"{100 * agreement:.0f}"
        try:
            point = searched.points[pick(searched, 1 - agreement)]
        except NoPoint as error:
            missing[f"fixed λ for {agreement:.0%}"] = str(error)
            continue
        threshold, measured = point.compute.exit_threshold, point.measured["agreement"]
        assert threshold is not None
        costs.append(point.measured["budget"])
        words = f"λ = {threshold:.3f} ({agreement:.0%} on the trace)"
        found.append(Method(f"calm-{name}", f"CALM, {words}", "CALM", _copy(threshold=threshold)))
        compute = _free(threshold=threshold)
        free.append(Method(f"free-{name}", f"FREE, {words}", "FREE fixed", compute, measured))
    found += free
    adaptive = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE)
    found.append(Method("free-adaptive", "FREE, adaptive λ", "FREE adaptive", adaptive))
    try:
        risk = certified.with_risk(
            ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.RISK, risk=RISK,
                          risk_confidence=RISK_CONFIDENCE)
        )  # fmt: skip
        label = f"risk, δ = {RISK} (λ = {risk.threshold:.3f})"
        found.append(Method("risk", label, "risk", risk, 1 - RISK))
    except TooLittleData as error:
        missing["risk"] = str(error)
    if costs:
        # What the fixed λ spends, so that the two can be compared.
        budget = round(costs[0], 3)
        compute = certified.with_budget(
            ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.BUDGET, budget=budget)
        )
        found.append(Method("budget", f"budget, {budget:g}", "budget", compute))
    return Methods(tuple(found), missing)


def _study(trace: Path) -> dict[str, object]:
    """Every λ of a grid, in mode free."""
    steps = 37
    return {
        "traces": [str(trace.resolve())],
        "objectives": ["quality", "budget"],
        "space": {
            "mode": "free",
            "policy": "threshold",
            "confidence": "softmax_gap",
            "exit_threshold": {"low": 0.05, "high": 0.95},
        },
        "searcher": "grid",
        "grid_steps": steps,
        "trials": steps,
        "max_points": steps,
    }


def _copy(policy: PolicyName = PolicyName.THRESHOLD, threshold: float = PAPER) -> ComputePolicy:
    return ComputePolicy(mode=AcceptMode.COPY, policy=policy, exit_threshold=threshold)


def _free(*, threshold: float) -> ComputePolicy:
    return ComputePolicy(mode=AcceptMode.FREE, exit_threshold=threshold)
