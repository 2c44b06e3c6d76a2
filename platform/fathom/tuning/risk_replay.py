"""Policy ``risk`` put to the test: certificates from half the requests, checked on the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fathom.exits.p_values import Bound
from fathom.exits.risk import (
    Certificate,
    Losses,
    RiskMonitor,
    TooLittleData,
    certify_losses,
    losses,
)
from fathom.tuning.rows import Integers, Measure, TraceRows


@dataclass(frozen=True, slots=True)
class Splits:
    """Certificates over many random splits.

    Attributes:
        splits: how many. refused: in so many the data was too little; nothing leaves then.
        violations: splits whose held-out requests lose more than delta on average, which is what
            the promise excludes with probability 1 - epsilon but for the held-out half's own noise.
        token_violations: the same by the share of all held-out tokens, which is not promised:
            long requests weigh more in it.
        coverage: mean share of held-out tokens that leave. oracle_coverage: the same at the lowest
            threshold that the held-out requests themselves allow.
        risk: mean held-out loss of a request.
    """

    delta: float
    epsilon: float
    bound: str
    splits: int
    refused: int
    violations: int
    token_violations: int
    coverage: float
    oracle_coverage: float
    risk: float


def split_losses(table: Losses, units: Integers) -> Losses:
    """The losses of some units."""
    return Losses(table.grid, table.rows[units], table.wrong[units], table.exits[units], table.unit)


def check_splits(
    table: Losses,
    delta: float,
    epsilon: float,
    *,
    bound: Bound = Bound.HOEFFDING_BENTKUS,
    splits: int = 200,
    seed: int = 0,
) -> Splits:
    """Certify on a random half of the units and check on the others, many times."""
    random = np.random.default_rng(seed)
    units = len(table.rows)
    refused, violations, token_violations = 0, 0, 0
    coverages, oracles, risks = np.zeros(splits), np.zeros(splits), np.zeros(splits)
    for number in range(splits):
        order = random.permutation(units)
        one, other = (split_losses(table, part) for part in np.array_split(order, 2))
        loss = (other.wrong / other.rows[:, None]).mean(axis=0)
        shares = other.exits.sum(axis=0) / other.rows.sum()
        allowed = np.flatnonzero(loss <= delta)
        oracles[number] = shares[allowed[-1]] if len(allowed) else 0.0
        try:
            found = certify_losses(one, delta, epsilon, bound)
        except TooLittleData:
            refused += 1
            continue
        if found.threshold >= 1:
            continue
        place = int(np.flatnonzero(other.grid == found.threshold)[0])
        risks[number] = loss[place]
        coverages[number] = shares[place]
        violations += bool(loss[place] > delta)
        token_violations += bool(other.wrong[:, place].sum() / other.rows.sum() > delta)
    return Splits(
        delta=delta,
        epsilon=epsilon,
        bound=bound.value,
        splits=splits,
        refused=refused,
        violations=violations,
        token_violations=token_violations,
        coverage=float(coverages.mean()),
        oracle_coverage=float(oracles.mean()),
        risk=float(risks.mean()),
    )


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A certificate on requests of another kind, for which it promises nothing.

    Attributes:
        risk: mean loss of a request there. coverage: share of tokens that leave.
        alarm_after: requests until the monitor contradicts the promise; None if it never does.
    """

    certificate: Certificate
    risk: float
    coverage: float
    requests: int
    alarm_after: int | None


def check_elsewhere(
    table: Losses, rows: TraceRows, measure: Measure, delta: float, epsilon: float
) -> Elsewhere | None:
    """Certify on one trace and run on another; None where the data does not certify anything."""
    try:
        found = certify_losses(table, delta, epsilon)
    except TooLittleData:
        return None
    other = losses(measure.of(rows), rows.agrees, rows.groups, grid=[found.threshold])
    monitor, alarm = RiskMonitor(delta), None
    each = other.wrong[:, 0] / other.rows
    for number, loss in enumerate(each.tolist(), 1):
        if monitor.observe(loss) and alarm is None:
            alarm = number
    return Elsewhere(
        certificate=found,
        risk=float(each.mean()),
        coverage=float(other.exits.sum() / other.rows.sum()),
        requests=len(each),
        alarm_after=alarm,
    )
