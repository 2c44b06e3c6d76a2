"""EERO's two steps: which share of the rows leaves at each head, and the thresholds for that.

The equations are eero.md's, a reconstruction of Valade, Hebiri, Gay (2024) from the abstract and
standard results, not the paper's text. Heads m = 1..M have cumulative costs B_1 < ... < B_M as
shares of the full cost. Which share p_m of all rows should leave at head m solves

    min over the simplex of  sum p_m R_m + beta KL(p || pi)   subject to  sum p_m B_m <= B,

R_m the held-out 0-1 error of head m over all rows. The solution is
p_m ∝ pi_m exp(-(R_m + mu B_m) / beta), mu = 0 where the budget is slack and else the root of the
budget. The prior pi is uniform there; the guarantee holds for any that the rows did not choose.
Quantiles of the confidence turn shares into thresholds.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from fathom.checks import InvalidRequest

Floats = NDArray[np.float64]


def exponential_weights(
    risks: ArrayLike,
    costs: ArrayLike,
    budget: float,
    beta: float,
    prior: ArrayLike | None = None,
) -> Floats:
    """Shares p of the rows that should leave at each head (see the module).

    Args:
        risks: [M] errors in [0, 1]. costs: [M] cumulative, ascending. budget: in their unit.
        beta: > 0; the smaller, the nearer to the linear program, which uses two heads at most.
        prior: [M] pi, above 0; need not sum to 1. None is uniform.

    Returns:
        [M] float64, the sum is 1.

    Raises:
        InvalidRequest: for a budget below the first head's cost.
        ValueError: for risks, costs, beta or prior that are not as above.
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
    pi = np.ones(len(b)) if prior is None else np.asarray(prior, dtype=np.float64)
    if pi.shape != b.shape or not (np.isfinite(pi) & (pi > 0)).all():
        raise ValueError(f"prior must be [heads] numbers above 0, got {pi.tolist()}.")
    check_budget(budget, float(b[0]))
    log_pi = np.log(pi)

    def shares(mu: float) -> Floats:
        return np.asarray(softmax(log_pi - (r + mu * b) / beta))

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


def one_threshold_shares(confidence: ArrayLike, costs: ArrayLike, budget: float) -> Floats:
    """Shares of the rows that leave at each head under one threshold for all, at this budget.

    The surer a head is of its rows, the more of them leave there: this knows how confidences of
    different heads compare, which errors of whole heads do not tell.

    Args:
        confidence: [n, M], n > 0; one that is not a number never leaves. costs: [M].

    Returns:
        [M] float64, of the highest threshold whose mean cost is within the budget; of the lowest
        one where none is.
    """
    c = np.nan_to_num(np.asarray(confidence, dtype=np.float64), nan=-np.inf)
    b = np.asarray(costs, dtype=np.float64)
    # A row leaves at or before head m under threshold t where the largest of its first m
    # confidences reaches t.
    reached = np.sort(np.maximum.accumulate(c[:, :-1], axis=1), axis=0)

    def shares(threshold: float) -> Floats:
        left = [1 - np.searchsorted(column, threshold) / len(c) for column in reached.T]
        return np.diff(np.array([0.0, *left, 1.0]))

    candidates = np.unique(c[np.isfinite(c)])
    low, high = 0, max(len(candidates) - 1, 0)  # the highest threshold that the budget allows
    while low < high:
        middle = (low + high + 1) // 2
        if shares(float(candidates[middle])) @ b <= budget + 1e-12:  # a sum may round up
            low = middle
        else:
            high = middle - 1
    return shares(float(candidates[low]) if len(candidates) else math.inf)


def check_budget(budget: float, smallest: float) -> None:
    """Check that a budget pays for a token that leaves at the first exit.

    Raises:
        InvalidRequest: naming budget, its value and the smallest one.
    """
    if not (math.isfinite(budget) and budget >= smallest):
        raise InvalidRequest(
            f"budget must be at least {smallest:.4g}, what a token costs that leaves at the first "
            f"exit, got {budget!r}.",
            param="budget",
        )
