"""Four other ways of spending a budget, each set up on the calibration rows alone.

static   one head for every row: the deepest that the budget allows, without the heads before it
global   one confidence threshold for all heads, tuned until the mean cost is the budget
msdnet   MSDNet's budgeted batches (Huang et al., 2018, section 5.2): a share of the rows that
         reach a head leaves there, the same share q at each, and thresholds are its quantiles
random   exits at random, as many at each head as EERO has there
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fathom.exits.budget import apply, quantile_thresholds
from fathom.models.classifier_files import Answers

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy gave on test rows.

    Attributes:
        realised: mean cost of a row, as a share of the full model's. accuracy: in [0, 1].
    """

    realised: float
    accuracy: float


def outcome(answers: Answers, exits: NDArray[np.int64], costs: Floats) -> Outcome:
    """What rows get that leave at these heads."""
    right = answers.correct[np.arange(len(exits)), exits]
    return Outcome(float(costs[exits].mean()), float(right.mean()))


def static(calibration: Answers, test: Answers, alone: Floats, budget: float) -> Outcome | None:
    """One head for all.

    Args:
        alone: [M] cost of a model with head m alone. None where the budget allows none.
    """
    affordable = np.flatnonzero(alone <= budget)
    if not len(affordable):
        return None
    head = int(affordable[-1])
    return Outcome(float(alone[head]), float(test.correct[:, head].mean()))


def one_threshold(calibration: Answers, test: Answers, costs: Floats, budget: float) -> Outcome:
    """One threshold for all heads: the mean cost on the calibration rows rises with it."""

    def cost(threshold: float) -> float:
        thresholds = np.full(len(costs), threshold)
        return float(costs[apply(calibration.confidence, thresholds)].mean())

    candidates = np.unique(calibration.confidence)
    low, high = 0, len(candidates) - 1  # the highest threshold that the budget allows
    while low < high:
        middle = (low + high + 1) // 2
        if cost(candidates[middle]) <= budget:
            low = middle
        else:
            high = middle - 1
    thresholds = np.full(len(costs), candidates[low])
    return outcome(test, apply(test.confidence, thresholds), costs)


def msdnet(calibration: Answers, test: Answers, costs: Floats, budget: float) -> Outcome:
    """Exit shares q (1 - q)^(m-1), normalized; q by bisection so that their cost is the budget.

    The ratio 1 - q of one share to the next may be above 1, as it may in the authors' code: then
    deeper heads have the larger shares, which large budgets need.
    """
    number = np.arange(len(costs))

    def shares(log_ratio: float) -> Floats:
        weights = np.exp(log_ratio * number - max(0.0, log_ratio * number[-1]))
        return np.asarray(weights / weights.sum())

    low, high = -40.0, 40.0  # log of (1 - q): the cost rises with it
    for _ in range(100):
        middle = (low + high) / 2
        if shares(middle) @ costs <= budget:
            low = middle
        else:
            high = middle
    thresholds, _ = quantile_thresholds(calibration.confidence, shares(low))
    return outcome(test, apply(test.confidence, thresholds), costs)


def at_random(test: Answers, shares: Floats, costs: Floats) -> Outcome:
    """The expectation over exits drawn with these shares, whatever the row."""
    return Outcome(float(shares @ costs), float(shares @ test.correct.mean(axis=0)))
