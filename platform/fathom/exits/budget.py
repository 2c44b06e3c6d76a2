"""EERO: early exits under a budget, by aggregation with exponential weights.

The equations are eero.md's, a reconstruction of Valade, Hebiri, Gay (2024) from the abstract and
standard results, not the paper's text. Heads m = 1..M have cumulative costs B_1 < ... < B_M as
shares of the full cost. Which share p_m of all rows should leave at head m solves

    min over the simplex of  sum p_m R_m + beta KL(p || uniform)   subject to  sum p_m B_m <= B,

R_m the held-out 0-1 error of head m over all rows. The solution is
p_m ∝ exp(-(R_m + mu B_m) / beta), mu = 0 where the budget is slack and else the root of the budget.
Quantiles of the confidence turn shares into thresholds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from fathom.checks import InvalidRequest
from fathom.exits.histogram import ConfidenceHistogram

Floats = NDArray[np.float64]

BETAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Tried by ``fit_exits``."""


@dataclass(frozen=True, slots=True)
class FittedExits:
    """Thresholds that spend a budget.

    Attributes:
        thresholds: [M]; a row leaves at the first head whose confidence is at least its threshold.
            inf where nobody leaves; the last one is 0.
        shares: [M] p, wanted of all rows at each head. realised: [M] of the calibration rows.
        budget: asked for. cost: of the calibration rows, a share of the full cost.
        risks: [M] R of the heads. beta: that was taken. accuracy: of the calibration rows.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    realised: tuple[float, ...]
    budget: float
    cost: float
    risks: tuple[float, ...]
    beta: float
    accuracy: float


def exponential_weights(risks: ArrayLike, costs: ArrayLike, budget: float, beta: float) -> Floats:
    """Shares p of the rows that should leave at each head (see the module).

    Args:
        risks: [M] errors in [0, 1]. costs: [M] cumulative, ascending. budget: in their unit.
        beta: > 0; the smaller, the nearer to the linear program, which uses two heads at most.

    Returns:
        [M] float64, the sum is 1.

    Raises:
        InvalidRequest: for a budget below the first head's cost.
        ValueError: for risks, costs or beta that are not as above.
    """
    r, b = np.asarray(risks, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    if r.ndim != 1 or r.shape != b.shape or not len(b):
        raise ValueError(f"risks and costs must be [heads] each, got {r.shape} and {b.shape}.")
    if not (np.isfinite(b).all() and (np.diff(b) > 0).all()):
        raise ValueError(f"costs must ascend from head to head, got {b.tolist()}.")
    if not np.isfinite(r).all():
        raise ValueError(f"risks must be numbers, got {r.tolist()}.")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}.")
    _check_budget(budget, float(b[0]))

    def shares(mu: float) -> Floats:
        return np.asarray(softmax(-(r + mu * b) / beta))

    if shares(0.0) @ b <= budget:
        return shares(0.0)
    high = 1.0
    while shares(high) @ b > budget:
        high *= 2
        if high > 1e12:  # the budget is the first head's cost, up to rounding
            return np.eye(len(b))[0]
    low = 0.0  # the cost falls as mu grows
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if shares(middle) @ b > budget:
            low = middle
        else:
            high = middle
    return shares(high)


def quantile_thresholds(
    confidence: ArrayLike, shares: ArrayLike
) -> tuple[Floats, NDArray[np.int64]]:
    """Thresholds under which the surest rows at each head leave, so many that shares are met.

    Step 6 of eero.md: head by head, a quantile among those who are still there. Targets are counted
    from the start, so that what ties let go too much at one head is made up for at the next.

    Args:
        confidence: [n, M], n > 0; one that is not a number never leaves. shares: [M].

    Returns:
        thresholds [M] float64, halfway between the rows on either side; and the head [n] int64,
        from 0, at which each row leaves.
    """
    c = np.nan_to_num(np.asarray(confidence, dtype=np.float64), nan=-np.inf)
    rows, heads = c.shape
    wanted = np.rint(np.cumsum(np.asarray(shares, dtype=np.float64)) * rows).astype(np.int64)
    thresholds = np.zeros(heads)
    exits = np.full(rows, heads - 1)
    left = np.arange(rows)
    for head in range(heads - 1):
        leave = int(min(max(wanted[head] - (rows - len(left)), 0), len(left)))
        thresholds[head] = _cut(c[left, head], leave)
        out = c[left, head] >= thresholds[head]
        exits[left[out]] = head
        left = left[~out]
    return thresholds, exits


def _cut(values: Floats, leave: int) -> float:
    """A value that the ``leave`` largest reach; equal ones leave together."""
    if not leave:
        return math.inf
    ordered = np.sort(values)[::-1]
    lowest = ordered[leave - 1]
    if lowest == -np.inf:  # only rows without a confidence are left to fill the share
        finite = ordered[ordered > -np.inf]
        return float(finite[-1]) if len(finite) else math.inf
    beneath = ordered[ordered < lowest]
    if not len(beneath):
        return 0.0 if lowest >= 0 else float(lowest)
    if beneath[0] == -np.inf:
        return float(lowest)
    middle = float((lowest + beneath[0]) / 2)
    return middle if middle > beneath[0] else float(lowest)


def fit_exits(
    confidence: ArrayLike,
    correct: ArrayLike,
    costs: ArrayLike,
    budget: float,
    *,
    beta: float | None = None,
) -> FittedExits:
    """From a calibration set to thresholds.

    Args:
        confidence: [n, M] float in [0, 1] of each head in its answer.
        correct: [n, M] bool, whether the answer is right (or: agrees with the last head's).
        costs: [M] cumulative, ascending; budget: in their unit.
        beta: of the aggregation; None takes the one of ``BETAS`` whose thresholds do best on the
            calibration set, the largest of equals.

    Raises:
        InvalidRequest: for a budget below the first head's cost.
        ValueError: for arrays that do not fit each other, or no rows.
    """
    c, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    b = np.asarray(costs, dtype=np.float64)
    if c.ndim != 2 or c.shape != right.shape or c.shape[1:] != b.shape or not len(c):
        raise ValueError(
            "confidence and correct must be [rows, heads] with at least one row and costs [heads], "
            f"got {c.shape}, {right.shape} and {b.shape}."
        )
    risks = 1 - right.mean(axis=0)
    best: FittedExits | None = None
    for tried in sorted(BETAS if beta is None else (beta,), reverse=True):
        shares = exponential_weights(risks, b, budget, tried)
        thresholds, exits = quantile_thresholds(c, shares)
        fitted = FittedExits(
            tuple(thresholds.tolist()),
            tuple(shares.tolist()),
            tuple((np.bincount(exits, minlength=len(b)) / len(c)).tolist()),
            budget,
            float(b[exits].mean()),
            tuple(risks.tolist()),
            tried,
            float(right[np.arange(len(c)), exits].mean()),
        )
        if best is None or fitted.accuracy > best.accuracy:
            best = fitted
    assert best is not None
    return best


def apply(confidence: ArrayLike, thresholds: ArrayLike) -> NDArray[np.int64]:
    """The head, from 0, at which each row leaves: the first whose threshold it reaches.

    Args:
        confidence: [n, M]; one that is not a number never leaves before the last head.
        thresholds: [M], of which the last is not looked at.

    Returns:
        [n] int64.
    """
    leaves = np.asarray(confidence, dtype=np.float64) >= np.asarray(thresholds, dtype=np.float64)
    leaves[:, -1] = True
    return np.asarray(leaves.argmax(axis=1))


def exit_share(budget: float, exit_cost: float) -> float:
    """With two heads: the least share of tokens that must leave at the exit for a budget.

    p B_1 + (1 - p) = B gives p = (1 - B) / (1 - B_1). The deep stage is the reference of quality
    in decoding, so a slack budget lets nobody go that need not.

    Args:
        budget: B, mean cost of a token as a share of a full one's.
        exit_cost: B_1, in (0, 1), of a token decided at the exit.

    Raises:
        InvalidRequest: for a budget below ``exit_cost``.
    """
    _check_budget(budget, exit_cost)
    return min(max((1 - budget) / (1 - exit_cost), 0.0), 1.0) if exit_cost < 1 else 0.0


def _check_budget(budget: float, smallest: float) -> None:
    if not (math.isfinite(budget) and budget >= smallest):
        raise InvalidRequest(
            f"budget must be at least {smallest:.4g}, what a token costs that leaves at the first "
            f"exit, got {budget!r}.",
            param="budget",
        )


class QuantileTracker:
    """Thresholds for token budgets that follow the confidences of this moment.

    λ is the quantile of all confidences seen above which the wanted share lies. Decoding steps are
    neither independent nor alike from request to request, so each request also feeds back what it
    has spent: with share p wanted, e of n tokens gone and a horizon of h tokens, the next ones are
    given p + (p n - e) / h. A request that sits beside the quantiles for ever is off by some
    constant number of tokens, not by a share of them.

    Args:
        histogram: of the confidences of all rows; whoever owns it adds to it.
        exit_cost: see ``exit_share``.
        horizon: h, in tokens.
        least_rows: rows before which no quantile is given.
        refresh: rows after which quantiles are read anew; in between they come from a table.
    """

    def __init__(
        self,
        histogram: ConfidenceHistogram,
        exit_cost: float,
        *,
        horizon: float = 16,
        least_rows: int = 32,
        refresh: int = 64,
    ) -> None:
        self.histogram = histogram
        self._exit_cost = exit_cost
        self._horizon = horizon
        self._least_rows = least_rows
        self._refresh = refresh
        self._read_at = -1
        self._table: list[float] = []

    def threshold(self, budget: float, exited: int = 0, decided: int = 0) -> float | None:
        """λ for the next token of a request; None before ``least_rows`` rows were seen.

        Args:
            exited: tokens of the request that left at the exit, of ``decided``.

        Raises:
            InvalidRequest: see ``exit_share``.
        """
        seen = self.histogram.seen
        if seen < self._least_rows:
            return None
        if self._read_at < 0 or not 0 <= seen - self._read_at < self._refresh:
            self._read(seen)
        share = exit_share(budget, self._exit_cost)
        aim = share + (share * decided - exited) / self._horizon
        if aim <= 0:
            return 1.0  # nobody is surer than that
        if aim >= 1:
            return -1.0  # everybody is, even at confidence 0
        at = (1 - aim) * (len(self._table) - 1)
        low = int(at)
        return self._table[low] + (at - low) * (self._table[low + 1] - self._table[low])

    def _read(self, seen: int) -> None:
        self._table = self.histogram.quantile(np.linspace(0, 1, 1025)).tolist()
        self._read_at = seen
