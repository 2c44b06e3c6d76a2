"""Does a confidence mean what it says? Temperature of the exit head, reliability, its error.

A trace does not hold the logits of each row, but their log-sum-exp at fixed temperatures, from
which loss, gap and largest probability at these temperatures follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline

Floats = NDArray[np.float64]

TEMPERATURES: tuple[float, ...] = tuple(np.geomspace(0.25, 4, 16).tolist())
"""At which traces note log-sum-exp."""


@dataclass(frozen=True, slots=True)
class FittedTemperature:
    """Temperature of the exit head, and what it is good for.

    Attributes:
        temperature: with the least loss, between those of ``TEMPERATURES``.
        loss: mean -log p of the deep stage's choice, in nats, there. before: at temperature 1.
        rows: that count. unscored: rows whose deep choice the exit head does not score.
    """

    temperature: float
    loss: float
    before: float
    rows: int
    unscored: int


def fit_temperature(deep_logit: ArrayLike, lse: ArrayLike) -> FittedTemperature:
    """Temperature T with the least mean of lse(T) - deep_logit / T (Guo et al. 2017).

    The mean of lse(T) is known at ``TEMPERATURES`` and taken from a cubic spline in log T between
    them.

    Args:
        deep_logit: [n] the exit head's logit of the deep stage's choice; -inf where it scores no
            such token. lse: [n, 16] log-sum-exp of the logits divided by each temperature.

    Raises:
        ValueError: for arrays that do not fit each other, or where no row can be scored.
    """
    target, totals = np.asarray(deep_logit, np.float64), np.asarray(lse, np.float64)
    if totals.shape != (*target.shape, len(TEMPERATURES)) or target.ndim != 1:
        raise ValueError(
            f"deep_logit must be [rows] and lse [rows, {len(TEMPERATURES)}], got {target.shape} "
            f"and {totals.shape}."
        )
    known = np.isfinite(target) & np.isfinite(totals).all(axis=1)
    if not known.any():
        raise ValueError("no row has a finite logit of the deep stage's choice to calibrate on.")
    mean_target = float(target[known].mean())
    spline = CubicSpline(np.log(TEMPERATURES), totals[known].mean(axis=0))

    def loss(log_t: Floats | float) -> Floats:
        return np.asarray(spline(log_t) - mean_target * np.exp(-np.asarray(log_t)))

    fine = np.linspace(math.log(TEMPERATURES[0]), math.log(TEMPERATURES[-1]), 4001)
    best = float(fine[int(loss(fine).argmin())])
    return FittedTemperature(
        temperature=math.exp(best),
        loss=float(loss(best)),
        before=float(loss(0.0)),
        rows=int(known.sum()),
        unscored=int((target == -np.inf).sum()),
    )


def probability_at(logit: ArrayLike, lse: ArrayLike, temperature: float) -> Floats:
    """Probability of one token of each row at a temperature: exp(logit / T - lse(T)).

    Of the best logit it is the largest probability; less that of the second it is the gap.

    Args:
        logit: [n]. lse: [n, 16]; between ``TEMPERATURES`` it is interpolated by a cubic spline.

    Returns:
        [n] float64 in [0, 1]; NaN for rows that are not finite.

    Raises:
        ValueError: for a temperature outside ``TEMPERATURES``.
    """
    if not TEMPERATURES[0] <= temperature <= TEMPERATURES[-1]:
        raise ValueError(
            f"temperature must be from {TEMPERATURES[0]} to {TEMPERATURES[-1]}, got {temperature}."
        )
    totals, found = np.asarray(lse, np.float64), np.full(len(np.asarray(lse)), np.nan)
    known = np.isfinite(totals).all(axis=1)
    if known.any():
        found[known] = CubicSpline(np.log(TEMPERATURES), totals[known], axis=1)(
            math.log(temperature)
        )
    return np.asarray(np.exp(np.minimum(np.asarray(logit, np.float64) / temperature - found, 0)))


@dataclass(frozen=True, slots=True)
class Reliability:
    """A reliability diagram.

    Attributes:
        edges: [bins + 1]. count: [bins] rows in each. confidence, accuracy: [bins] means of each,
            NaN for an empty one.
        ece: expected calibration error, sum of count / n * |accuracy - confidence| (Naeini et al.
            2015). mce: the largest such gap of any bin. overconfidence: mean confidence less
            accuracy, of all rows.
    """

    edges: Floats
    count: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats
    ece: float
    mce: float
    overconfidence: float


def reliability(
    confidence: ArrayLike, agrees: ArrayLike, *, bins: int = 15, equal_mass: bool = False
) -> Reliability:
    """How often rows agree, by their confidence.

    Args:
        confidence: [n] float in [0, 1]; those that are not numbers are left out.
        agrees: [n] bool.
        equal_mass: bins of about equally many rows, rather than of equal width; rows of equal
            confidence stay together.

    Raises:
        ValueError: if no row is left, for arrays of different lengths or for no bins.
    """
    c, y = np.asarray(confidence, np.float64), np.asarray(agrees, bool)
    if c.shape != y.shape or c.ndim != 1:
        raise ValueError(f"confidence and agrees must be [rows] each, got {c.shape}, {y.shape}.")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    c, y = c[~np.isnan(c)], y[~np.isnan(c)]
    if not len(c):
        raise ValueError("no row has a confidence to judge.")
    ends = np.linspace(0, 1, bins + 1)
    if equal_mass:
        last = np.arange(1, bins) * len(c) // bins - 1  # of each bin but the highest
        inner = np.sort(c)[last[last >= 0]]
        ends = np.unique(np.concatenate([[0.0], inner, [1.0]]))
    # Bins are (low, high], the first one with its low end.
    places = np.clip(np.searchsorted(ends, c, side="left") - 1, 0, len(ends) - 2)
    count = np.bincount(places, minlength=len(ends) - 1)
    with np.errstate(invalid="ignore"):
        confidences = np.bincount(places, weights=c, minlength=len(count)) / count
        accuracies = np.bincount(places, weights=y, minlength=len(count)) / count
    gaps = np.abs(accuracies - confidences)[count > 0]
    return Reliability(
        edges=ends,
        count=count,
        confidence=confidences,
        accuracy=accuracies,
        ece=float(count[count > 0] @ gaps / len(c)),
        mce=float(gaps.max()),
        overconfidence=float(c.mean() - y.mean()),
    )
