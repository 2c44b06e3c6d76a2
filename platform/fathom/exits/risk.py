"""Promises about risk: "disagree with the full model on at most δ of the tokens".

Learn-then-Test (Angelopoulos, Bates, Candès, Jordan, Lei 2021), as CALM (Schuster et al. 2022)
uses it: thresholds of a grid are tested from the safest down, each with a p-value of "the risk is
above δ", until one is not rejected. With probability 1 - ε over the calibration data, the risk at
the last rejected threshold is at most δ, for units that are exchangeable with those to come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fathom.checks import InvalidRequest
from fathom.exits.histogram import edges
from fathom.exits.p_values import Bound, betting, divergence, hoeffding_bentkus

Floats = NDArray[np.float64]

GRID: Floats = edges(128)[-2:0:-1]
"""Thresholds from the safest down; fixed beforehand, close together near 1."""


class Unit(StrEnum):
    """What is exchangeable."""

    REQUEST = "request"  # its loss is the share of its tokens that leave and are wrong
    TOKEN = "token"  # only where tokens are independent, which those of decoding are not


class TooLittleData(InvalidRequest):
    """A promise that the calibration data cannot carry.

    Attributes:
        have: units that there are. need: about how many would do.
    """

    def __init__(self, message: str, *, have: int = 0, need: int = 0) -> None:
        super().__init__(message, param="risk")
        self.have = have
        self.need = need


@dataclass(frozen=True, slots=True)
class Certificate:
    """A threshold with its promise.

    Attributes:
        threshold: λ; tokens of a confidence above it may leave. 1 where nobody may: then the
            promise holds, without any gain.
        delta, epsilon: P(risk <= delta) >= 1 - epsilon. n: units of the calibration data.
        risk_hat: mean loss at λ there. coverage: share of the rows that leave at λ.
        p_values: of the grid's thresholds that were tested, the last one perhaps not rejected.
        unit: what was taken for exchangeable. bound: whose p-values they are.
    """

    threshold: float
    delta: float
    epsilon: float
    n: int
    risk_hat: float
    coverage: float
    p_values: tuple[float, ...]
    unit: Unit
    bound: Bound


@dataclass(frozen=True, slots=True)
class Losses:
    """What each unit loses at each threshold: all that a certificate needs.

    Attributes:
        grid: [G] thresholds, descending. rows: [units] of each. wrong, exits: [units, G] rows that
            leave and disagree, and rows that leave, int32.
        unit: see ``Unit``.
    """

    grid: Floats
    rows: NDArray[np.int64]
    wrong: NDArray[np.int32]
    exits: NDArray[np.int32]
    unit: Unit


def losses(
    confidence: ArrayLike,
    agrees: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    grid: ArrayLike = GRID,
    unit: Unit = Unit.REQUEST,
) -> Losses:
    """Losses of a trace.

    Args:
        confidence: [n]; one that is not a number never leaves. agrees: [n] bool.
        groups: [n] request of each row, any type that sorts; needed for unit ``request``.
        grid: thresholds, descending.

    Raises:
        ValueError: for arrays that do not fit each other, no groups, or a grid that ascends.
    """
    c = np.nan_to_num(np.asarray(confidence, dtype=np.float64), nan=-np.inf)
    wrong = ~np.asarray(agrees, dtype=bool)
    values = np.asarray(grid, dtype=np.float64)
    if c.ndim != 1 or c.shape != wrong.shape:
        raise ValueError(f"confidence and agrees must be [rows], got {c.shape}, {wrong.shape}.")
    if values.ndim != 1 or not len(values) or not (np.diff(values) < 0).all():
        raise ValueError("grid must hold thresholds in descending order.")
    if unit is Unit.TOKEN:
        owner, units = np.arange(len(c)), len(c)
    elif groups is None:
        raise ValueError("groups must name the request of each row, for unit request.")
    else:
        names = np.asarray(groups)
        if names.shape != c.shape:
            raise ValueError(f"groups must be [rows] as confidence, got {names.shape}, {c.shape}.")
        found, owner = np.unique(names, return_inverse=True)
        units = len(found)
    # A row leaves at threshold number g and all after it, g the first that is below it.
    first = len(values) - np.searchsorted(values[::-1], c, side="left")

    def counted(rows: NDArray[np.bool_]) -> NDArray[np.int32]:
        inside = rows & (first < len(values))
        places = owner[inside] * len(values) + first[inside]
        table = np.bincount(places, minlength=units * len(values)).reshape(units, len(values))
        return table.cumsum(axis=1).astype(np.int32)

    everybody = np.ones(len(c), dtype=bool)
    rows = np.bincount(owner, minlength=units)
    return Losses(values, rows, counted(wrong), counted(everybody), unit)


def certify(
    confidence: ArrayLike,
    agrees: ArrayLike,
    groups: ArrayLike | None,
    delta: float,
    epsilon: float = 0.1,
    grid: ArrayLike = GRID,
    unit: Unit = Unit.REQUEST,
    bound: Bound = Bound.HOEFFDING_BENTKUS,
) -> Certificate:
    """The lowest threshold that the calibration data certifies; see ``losses``, ``certify_losses``.

    Raises:
        TooLittleData: see ``certify_losses``. ValueError: see ``losses``.
    """
    table = losses(confidence, agrees, groups, grid=grid, unit=unit)
    return certify_losses(table, delta, epsilon, bound)


def certify_losses(
    table: Losses, delta: float, epsilon: float = 0.1, bound: Bound = Bound.HOEFFDING_BENTKUS
) -> Certificate:
    """Fixed-sequence testing: down the grid while the p-value is at most epsilon.

    Args:
        delta: δ in (0, 1), of the mean loss of a unit. epsilon: in (0, 1). bound: to be chosen
            before looking at what either gives.

    Raises:
        TooLittleData: if even the first threshold cannot be certified, although few of its rows are
            wrong.
        ValueError: for a delta or epsilon out of range.
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value}.")
    n = len(table.rows)
    if not n:
        raise _too_little(table, delta, epsilon, 0.0)
    each = table.wrong / table.rows[:, None]
    risks = each.mean(axis=0)
    if bound is Bound.BETTING:
        p_values = betting(each, delta)
    else:
        p_values = hoeffding_bentkus(risks, n, delta)
    stop = int(np.argmax(p_values > epsilon)) if (p_values > epsilon).any() else len(p_values)
    if not stop and risks[0] < delta:
        raise _too_little(table, delta, epsilon, float(risks[0]))
    last = stop - 1
    return Certificate(
        threshold=float(table.grid[last]) if stop else 1.0,
        delta=delta,
        epsilon=epsilon,
        n=n,
        risk_hat=float(risks[last]) if stop else 0.0,
        coverage=float(table.exits[:, last].sum() / table.rows.sum()) if stop else 0.0,
        p_values=tuple(p_values[: stop + 1].tolist()),
        unit=table.unit,
        bound=bound,
    )


def _too_little(table: Losses, delta: float, epsilon: float, risk: float) -> TooLittleData:
    have = len(table.rows)
    need = math.ceil(math.log(1 / epsilon) / float(divergence(risk, delta)))
    noun = f"{table.unit}s"
    return TooLittleData(
        f"risk {delta:g} with confidence {1 - epsilon:g} cannot be promised from {have} {noun} "
        f"({int(table.rows.sum())} rows) of calibration: about {need} {noun} would do. Trace more, "
        "or ask for a larger risk or a smaller risk_confidence.",
        have=have,
        need=need,
    )


def oracle_threshold(
    confidence: ArrayLike,
    agrees: ArrayLike,
    groups: ArrayLike | None,
    delta: float,
    grid: ArrayLike = GRID,
    unit: Unit = Unit.REQUEST,
) -> tuple[float, float]:
    """The lowest threshold of the grid whose risk on these very rows is at most delta.

    Returns:
        threshold, and the share of the rows that leave; (1, 0) where there is none.
    """
    table = losses(confidence, agrees, groups, grid=grid, unit=unit)
    risks = (table.wrong / table.rows[:, None]).mean(axis=0)
    passing = int((risks <= delta).sum())  # risks rise along the grid
    if not passing:
        return 1.0, 0.0
    share = float(table.exits[:, passing - 1].sum() / table.rows.sum())
    return float(table.grid[passing - 1]), share


class RiskMonitor:
    """Watches a promise while it is used; its false alarms are rare however long it watches.

    It bets against "the mean loss is at most δ". Started at row s with stake ν, its wealth is the
    product of 1 + ν (x - δ) over rows from s on: a nonnegative supermartingale while the promise
    holds, for losses x >= 0 whose mean, given what came before, is at most δ (Waudby-Smith and
    Ramdas 2024; Ville's inequality). Money is split over stakes and, in parts of 1 / (s (s + 1)),
    over starts, so that a promise that breaks late is noticed too. P(ever alarmed) <= alpha.

    Args:
        delta: δ in (0, 1). alpha: rate of false alarms, in (0, 1).

    Attributes:
        rows: seen. evidence: the wealth, 1 at first; an alarm from 1 / alpha on.
        alert: whether it was ever there.
        risk: mean loss of the last few hundred rows.

    Raises:
        ValueError: for a delta or alpha out of range.
    """

    def __init__(self, delta: float, alpha: float = 0.05, *, memory: float = 500) -> None:
        for name, value in (("delta", delta), ("alpha", alpha)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}.")
        self.delta = delta
        self.alpha = alpha
        self.rows = 0
        self.evidence = 1.0
        self.alert = False
        self.risk = 0.0
        self._keep = 0.5 ** (1 / memory)
        self._seen = 0.0
        # Small stakes for losses that are rare and large (probes of a few per cent of the rows).
        self._stakes = np.geomspace(1e-4, 0.5, 12) / delta
        self._without_loss = 1 - self._stakes * delta
        self._wealth = np.zeros(len(self._stakes))

    def observe(self, loss: float, chance: float = 1.0) -> bool:
        """Take one row (or request) into account.

        Args:
            loss: in [0, 1]: 1 for a token that left and is wrong, 0 for one that stayed, or left
                and is right, or left and was not looked at; or a request's mean of these.
            chance: probability with which it was looked at; the loss counts 1 / chance, so that
                its mean is the risk.

        Returns:
            ``alert``. A loss that is not a number is left out.
        """
        if loss != loss:
            return self.alert
        self.rows += 1
        x = loss / chance
        self._seen = self._seen * self._keep + 1
        self.risk += (x - self.risk) / self._seen
        start = 1 / (self.rows * (self.rows + 1))
        self._wealth += start
        self._wealth *= self._without_loss + self._stakes * x if x else self._without_loss
        # What has not been staked yet is kept: 1 less the sum of all starts so far.
        self.evidence = float(self._wealth.sum()) / len(self._stakes) + 1 / (self.rows + 1)
        if self.evidence >= 1 / self.alpha:
            self.alert = True
        return self.alert
