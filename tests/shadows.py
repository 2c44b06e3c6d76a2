"""Completions in the shadow: made up, or from the rows of a trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fathom.exits.drift import Expected, Level, PointWatch
from fathom.exits.shadow import Notes, Shadowed
from fathom.tuning.rows import Measure, TraceRows
from fathom.types import AcceptMode, ComputePolicy

FREE = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.5, operating_point="p")
MEASURE = "softmax_gap"


def completion(
    rng: np.random.Generator,
    *,
    loss: float = 0.05,
    alpha: float = 3.0,
    beta: float = 1.5,
    rows: int = 20,
    compute: ComputePolicy = FREE,
) -> Shadowed:
    """One whose rows are alike, as those of real ones are, and differ from one to the next.

    Args:
        loss: mean share of its tokens that are wrong. alpha, beta: of its confidences.
    """
    lean = rng.normal(0, 0.3)
    notes = Notes()
    own_loss = rng.beta(4 * loss, 4 * (1 - loss)) if loss else 0.0
    for c in rng.beta(alpha * np.exp(lean), beta, size=rows):
        agrees = bool(rng.random() >= own_loss)
        notes.row(float(c), agrees=agrees, stands=True)
    return Shadowed(
        point=compute.operating_point,
        compute=compute,
        asked=rows,
        decided=rows,
        exited=rows,
        wrong=notes.wrong,
        layer_tokens=12 * rows,
        rows=notes.rows,
        agreed=notes.agreed,
    )


def expected_of(rng: np.random.Generator, *, loss: float, count: int = 3000) -> Expected:
    """What a point is measured on whose completions are ``completion``'s; three levels."""
    shares = np.array([np.array(completion(rng).rows) / 20 for _ in range(count)])
    tail = shares[:, ::-1].cumsum(axis=1)[:, ::-1].mean(axis=0)
    bins = [int(np.abs(tail - share).argmin()) for share in (0.8, 0.5, 0.2)]
    return Expected(
        compute=FREE,
        loss=loss,
        agreement=0.95,
        measure=MEASURE,
        levels=tuple(Level(b, float(tail[b]), 0.05) for b in bins),
        shares=tuple(shares.mean(axis=0).tolist()),
    )


def completions_of(rows: TraceRows, compute: ComputePolicy) -> Iterator[Shadowed]:
    """The completions of a trace as a point with a fixed threshold would have let them leave."""
    confidence = Measure(compute.confidence, compute.exit_temperature).of(rows)
    for group in np.unique(rows.groups):
        own = rows.groups == group
        notes = Notes()
        leaves = confidence[own] > compute.threshold
        for c, agrees, stands in zip(confidence[own], rows.agrees[own], leaves, strict=True):
            notes.row(float(c), agrees=bool(agrees), stands=bool(stands))
        yield Shadowed(
            point=compute.operating_point,
            compute=compute,
            asked=notes.asked,
            decided=int(own.sum()),
            exited=int(leaves.sum()),
            wrong=notes.wrong,
            rows=notes.rows,
            agreed=notes.agreed,
        )


def until_alarm(watch: PointWatch, stream: Iterator[Shadowed], most: int) -> int | None:
    """Completions until an alarm, or None if there is none in ``most``."""
    for count, each in zip(range(1, most + 1), stream, strict=False):
        watch.observe(each)
        if watch.reasons:
            return count
    return None
