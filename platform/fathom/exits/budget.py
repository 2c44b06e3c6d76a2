"""Budgets: "at most B of full compute", as thresholds (EERO; see ``exits.aggregation``).

``fit_exits`` is for any number of heads and a calibration set. Decoding has two, and what its
tokens are like changes all the time: there a ``QuantileTracker`` follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fathom.exits.aggregation import (
    check_budget,
    exponential_weights,
    one_threshold_shares,
    quantile_thresholds,
)
from fathom.exits.histogram import ConfidenceHistogram

Floats = NDArray[np.float64]

BETAS: tuple[float, ...] = tuple(np.geomspace(1e-4, 1, 13).tolist())
"""Tried by ``fit_exits``."""
_RAREST = 1e-6
_BUDGETS = 256
_MOST_CARRIED = 0.75
_SHARES = np.linspace(0, 1, 1025)
"""Of the quantiles in a tracker's table."""


@dataclass(frozen=True, slots=True)
class FittedExits:
    """Thresholds that spend a budget.

    Attributes:
        thresholds: [M]; a row leaves at the first head whose confidence is at least its threshold.
            inf where nobody leaves; the last one is 0.
        shares: [M] p, wanted of all rows at each head. realised: [M] of the calibration rows.
        budget: asked for. cost: of the calibration rows, a share of the full cost.
        risks: [M] R of the heads. beta, prior: that were taken. accuracy: of the calibration rows.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    realised: tuple[float, ...]
    budget: float
    cost: float
    risks: tuple[float, ...]
    beta: float
    prior: tuple[float, ...]
    accuracy: float


def fit_exits(
    confidence: ArrayLike,
    correct: ArrayLike,
    costs: ArrayLike,
    budget: float,
    *,
    beta: float | None = None,
    prior: ArrayLike | None = None,
    spend: bool = False,
) -> FittedExits:
    """From a calibration set to thresholds.

    Args:
        confidence: [n, M] float in [0, 1] of each head in its answer.
        correct: [n, M] bool, whether the answer is right (or: agrees with the last head's).
        costs: [M] cumulative, ascending; budget: in their unit.
        beta: of the aggregation; None takes the one of ``BETAS`` whose thresholds do best on the
            calibration set. A large beta spreads rows over all heads and may leave budget unspent;
            such a one is taken only if it does better by more than a standard error, as where
            deeper heads overthink.
        prior: [M] of the aggregation. None takes the uniform one, as eero.md does, for a given
            ``beta``, and else the better of it and ``one_threshold_shares``.
        spend: take none that leaves budget unspent, if there is another.

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
    uniform = np.full(len(b), 1 / len(b))
    priors = [uniform if prior is None else np.asarray(prior, dtype=np.float64)]
    if prior is None and beta is None:
        check_budget(budget, float(b[0]))
        priors.append(np.maximum(one_threshold_shares(c, b, budget), _RAREST))
    candidates = [
        _fitted(c, right, b, budget, risks, each, pi)
        for pi in priors
        for each in (BETAS if beta is None else (beta,))
    ]

    def rank(fitted: FittedExits) -> tuple[bool, float]:
        spends = float(np.dot(fitted.shares, b)) >= budget * (1 - 1e-3)
        error = math.sqrt(fitted.accuracy * (1 - fitted.accuracy) / len(c))
        return spends or not spend, fitted.accuracy - (0 if spends else error)

    return max(candidates, key=rank)


def _fitted(
    confidence: Floats,
    correct: NDArray[np.bool_],
    costs: Floats,
    budget: float,
    risks: Floats,
    beta: float,
    prior: Floats,
) -> FittedExits:
    shares = exponential_weights(risks, costs, budget, beta, prior)
    thresholds, exits = quantile_thresholds(confidence, shares)
    rows = len(confidence)
    return FittedExits(
        thresholds=tuple(thresholds.tolist()),
        shares=tuple(shares.tolist()),
        realised=tuple((np.bincount(exits, minlength=len(costs)) / rows).tolist()),
        budget=budget,
        cost=float(costs[exits].mean()),
        risks=tuple(risks.tolist()),
        beta=beta,
        prior=tuple(prior.tolist()),
        accuracy=float(correct[np.arange(rows), exits].mean()),
    )


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
    check_budget(budget, exit_cost)
    return min(max((1 - budget) / (1 - exit_cost), 0.0), 1.0) if exit_cost < 1 else 0.0


class QuantileTracker:
    """Thresholds that follow the confidences of this moment.

    λ is the quantile of all confidences seen above which the wanted share lies, corrected twice.

    Decoding steps are neither independent nor alike from request to request. So each request feeds
    back what it has spent: with share p wanted, e of n tokens gone and a horizon of h tokens, the
    next ones are given p + (p n - e) / h. And what requests of a budget were short of or over at
    their ends is carried on to the next ones, over a longer horizon: many short requests, each a
    little off in the same direction, would add up otherwise.

    Args:
        histogram: of the confidences of all rows; whoever owns it adds to it.
        exit_cost: see ``exit_share``.
        horizon: h, in tokens. carried_horizon: the same for what is carried on.
        least_rows: rows before which no quantile is given.
        every: rows after which ``refresh`` reads quantiles anew; in between they come from a table.
    """

    def __init__(
        self,
        histogram: ConfidenceHistogram,
        exit_cost: float,
        *,
        horizon: float = 16,
        carried_horizon: float = 256,
        least_rows: int = 32,
        every: int = 64,
    ) -> None:
        self.histogram = histogram
        self._exit_cost = exit_cost
        self._horizon = horizon
        self._carried_horizon = carried_horizon
        self._least_rows = least_rows
        self._every = every
        self._read_at = 0
        self._table: list[float] = []
        self._owed: dict[float, float] = {}

    def threshold(self, budget: float, exited: int = 0, decided: int = 0) -> float | None:
        """λ for the next token of a request; None before ``least_rows`` rows were seen.

        Args:
            budget: see ``exit_share``.
            exited: tokens of the request that left at the exit, of ``decided``.

        Returns:
            from 0 to 1, or below 0 where everybody is to leave.

        Raises:
            InvalidRequest: see ``exit_share``.
        """
        seen = self.histogram.seen
        if seen < self._least_rows:
            return None
        if not self._table:
            self._read()
        share = exit_share(budget, self._exit_cost)
        carried = self._owed.get(budget, 0.0) / self._carried_horizon
        aim = share + (share * decided - exited) / self._horizon + carried
        if aim <= 0:
            return 1.0  # nobody is surer than that
        if aim >= 1:
            return -1.0  # everybody is, even at confidence 0
        at = (1 - aim) * (len(self._table) - 1)
        low = min(int(at), len(self._table) - 2)  # an aim near 0 rounds to the end
        return self._table[low] + (at - low) * (self._table[low + 1] - self._table[low])

    def follow(self, histogram: ConfidenceHistogram) -> None:
        """Go on with other counts."""
        self.histogram = histogram
        if self._table:
            self._read()

    def refresh(self) -> None:
        """Read quantiles anew, if any were asked for and enough rows came since the last time."""
        if self._table and self.histogram.seen - self._read_at >= self._every:
            self._read()

    def _read(self) -> None:
        self._table = self.histogram.quantile(_SHARES).tolist()
        self._read_at = self.histogram.seen

    def settle(self, budget: float, exited: int, decided: int) -> None:
        """Carry on what a request that is over was short of, or over.

        Args:
            exited: tokens of the request that left at the exit, of ``decided``.

        Raises:
            InvalidRequest: see ``exit_share``.
        """
        owed = self._owed.pop(budget, 0.0)
        owed += exit_share(budget, self._exit_cost) * decided - exited
        # Held within bounds: a debt that no threshold can pay must not grow for ever.
        most = _MOST_CARRIED * self._carried_horizon
        self._owed[budget] = min(max(owed, -most), most)
        if len(self._owed) > _BUDGETS:
            del self._owed[next(iter(self._owed))]  # the budget unused for the longest time
