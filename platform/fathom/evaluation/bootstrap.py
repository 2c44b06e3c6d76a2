"""How far a figure could have been another with other prompts of the same kind."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fathom.evaluation.metrics import Statistic

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its percentile confidence interval; all None where nothing was measured."""

    value: float | None
    low: float | None
    high: float | None


def interval(
    statistic: Statistic, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Interval:
    """Percentile bootstrap over prompts (Efron, 1979), with fixed seeds.

    A resample of n prompts is n draws with replacement: how often each was drawn, times its row,
    are the resample's sums, so all resamples are one product of matrices.
    """
    rows = statistic.rows
    if not len(rows):
        return Interval(None, None, None)
    value = float(statistic.combine(rows.sum(axis=0, keepdims=True))[0])
    if not math.isfinite(value):
        return Interval(None, None, None)
    n = len(rows)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    figures = statistic.combine(draws @ rows)
    # A resample of answers without a token has no mean a token.
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(figures, [tail, 1 - tail])
    # Sums in another order may differ from the value in the last bit.
    return Interval(value, min(float(low), value), max(float(high), value))
