"""Reliability of the exit head's confidences: the table and the diagrams of a trace."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fathom.compute import Confidence
from fathom.exits.calibration import FittedTemperature, Reliability, fit_temperature, reliability
from fathom.exits.coverage import coverage_at_precision
from fathom.exits.histogram import edges
from fathom.exits.meta import MetaClassifier
from fathom.tuning.plotting import GREY, panels, save, style
from fathom.tuning.rows import Bools, Floats, TraceRows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRECISIONS = (0.9, 0.95, 0.98)
_BINS = 15


@dataclass(frozen=True, slots=True)
class MeasureReport:
    """One confidence measure at one temperature, on held-out requests.

    Attributes:
        coverage: most rows that one threshold lets go with a precision, by precision.
        auroc: probability that a row that agrees is surer than one that does not.
    """

    confidence: Confidence
    temperature: float
    reliability: Reliability
    coverage: dict[float, float]
    auroc: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a trace says of its exit head; temperature from one half, all else from the other.

    Attributes:
        exits: share of tokens that would leave at each of ``thresholds``, by softmax gap, and the
            share that would be wrong.
    """

    rows: int
    requests: int
    agreement: float
    temperature: FittedTemperature
    measures: list[MeasureReport]
    thresholds: Floats
    exits: Floats
    wrong: Floats


def make_report(rows: TraceRows, *, seed: int = 0, meta: MetaClassifier | None = None) -> Report:
    """Judge every measure before and after the temperature.

    Args:
        meta: to be judged as well; it must not have seen the trace, which must have exit states.

    Raises:
        ValueError: for a trace of fewer than two requests, or without exit states for ``meta``.
    """
    return judge_rows(*rows.halves(seed), meta=meta)


def judge_rows(half: TraceRows, rest: TraceRows, *, meta: MetaClassifier | None = None) -> Report:
    """The report on ``rest``, with the temperature of ``half``; see ``make_report``."""
    fitted = fit_temperature(half.deep, half.lse)
    measures = []
    for confidence in Confidence:
        if confidence is Confidence.META:
            if meta is not None:
                measures.append(judge(confidence, 1.0, meta_confidence(rest, meta), rest.agrees))
            continue
        scaled = () if confidence is Confidence.SATURATION else (fitted.temperature,)
        measures += [
            judge(confidence, t, rest.confidence(confidence, t), rest.agrees)
            for t in (1.0, *scaled)
        ]
    thresholds = edges(64)[::-1]
    gone = rest.gap[:, None] > thresholds
    return Report(
        rows=len(rest),
        requests=rest.num_requests,
        agreement=rest.agreement,
        temperature=fitted,
        measures=measures,
        thresholds=thresholds,
        exits=np.asarray(gone.mean(axis=0)),
        wrong=np.asarray((gone & ~rest.agrees[:, None]).mean(axis=0)),
    )


def judge(
    confidence: Confidence, temperature: float, values: Floats, agrees: Bools
) -> MeasureReport:
    """One measure's figures over rows."""
    scores, right = torch.from_numpy(np.asarray(values)), torch.from_numpy(np.asarray(agrees))
    return MeasureReport(
        confidence=confidence,
        temperature=temperature,
        reliability=reliability(values, agrees, bins=_BINS),
        coverage={p: coverage_at_precision(scores, right, p)[0] for p in PRECISIONS},
        auroc=_auroc(values, agrees),
    )


def meta_confidence(rows: TraceRows, meta: MetaClassifier) -> Floats:
    """The classifier's confidence at each row, [n].

    Raises:
        ValueError: for a trace without exit states.
    """
    if rows.hidden is None:
        raise ValueError(
            f"{rows.name}: has no exit states, which confidence meta needs: record it again with "
            "--trace-hidden."
        )
    parts = np.array_split(rows.hidden, max(1, len(rows) // 4096))
    found = [meta.confidence(torch.from_numpy(part.copy())).numpy() for part in parts]
    return np.concatenate(found).astype(np.float64)


def _auroc(values: Floats, agrees: Bools) -> float:
    """By ranks (Mann and Whitney); ties count half."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    good, bad = int(agrees.sum()), int((~agrees).sum())
    if not good or not bad:
        return float("nan")
    return float((ranks[agrees].sum() - good * (good + 1) / 2) / (good * bad))


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON can hold it; empty bins are null."""
    return {
        "rows": report.rows,
        "requests": report.requests,
        "agreement": report.agreement,
        "temperature": asdict(report.temperature),
        "measures": [
            {
                "confidence": each.confidence.value,
                "temperature": each.temperature,
                "ece": each.reliability.ece,
                "overconfidence": each.reliability.overconfidence,
                "auroc": each.auroc,
                "coverage": {f"{p:g}": share for p, share in each.coverage.items()},
                "bins": [
                    {
                        "low": float(each.reliability.edges[i]),
                        "high": float(each.reliability.edges[i + 1]),
                        "count": int(count),
                        "confidence": float(each.reliability.confidence[i]) if count else None,
                        "accuracy": float(each.reliability.accuracy[i]) if count else None,
                    }
                    for i, count in enumerate(each.reliability.count)
                ],
            }
            for each in report.measures
        ],
        "exits": [
            {"threshold": float(t), "share": float(s), "wrong": float(w)}
            for t, s, w in zip(report.thresholds, report.exits, report.wrong, strict=True)
        ],
    }


def draw(report: Report, rows: TraceRows, folder: Path) -> list[Path]:
    """Write the diagrams as PNG: reliability, coverage and exit depth.

    Raises:
        ImportError: without matplotlib.
    """
    with style():
        return [
            save(reliability_diagram(report), folder / "reliability.png"),
            save(_exits_diagram(report, rows), folder / "exits.png"),
        ]


def reliability_diagram(report: Report) -> Figure:
    """Agreement by confidence, one panel a measure, before and after the temperature."""
    grouped: dict[Confidence, list[MeasureReport]] = {}
    for each in report.measures:
        grouped.setdefault(each.confidence, []).append(each)
    figure, plots = panels(len(grouped), width=3.9, height=4.3)
    for plot, (confidence, own) in zip(plots, grouped.items(), strict=True):
        plot.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        for each, marker in zip(own, "os", strict=False):
            known = each.reliability
            full = known.count > 0
            label = f"T = {each.temperature:.2f}, ECE {known.ece:.3f}"
            plot.plot(
                known.confidence[full], known.accuracy[full], marker=marker, ms=5, label=label
            )
        plot.set(title=confidence.value, xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
        plot.legend(loc="upper left", fontsize=10)
    plots[0].set_ylabel("agreement with the full model")
    return figure


def _exits_diagram(report: Report, rows: TraceRows) -> Figure:
    """What thresholds let go, and the depth of tokens at a few precisions."""
    figure, (left, right) = panels(2, width=4.8, height=4.3)
    kept = report.exits > 0
    left.plot(report.exits[kept], 1 - report.wrong[kept] / report.exits[kept])
    left.set(xlabel="share of tokens that exit", ylabel="of them right", title="softmax gap")
    source = rows.source
    depths = [source.exit_depth, source.num_layers]
    width = 0.8 / len(PRECISIONS)
    gap = next(m for m in report.measures if m.confidence is Confidence.SOFTMAX_GAP)
    for number, (precision, share) in enumerate(gap.coverage.items()):
        place = np.arange(2) + (number - 1) * width
        right.bar(place, [share, 1 - share], width, label=f"{precision:.0%} of exits right")
    right.set_xticks([0, 1], [f"{depth} layers" for depth in depths])
    right.set(ylabel="share of tokens", ylim=(0, 1), title="depth of tokens")
    right.legend(fontsize=10)
    return figure
