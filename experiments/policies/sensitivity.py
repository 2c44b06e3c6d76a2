"""How two settings of the live policies were weighed: the horizon of budgets, the half-life of λ.

python -m experiments.policies.sensitivity gsm8k.parquet dialogsum.parquet
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from fathom.exits.bias import Method
from fathom.exits.budget import QuantileTracker
from fathom.exits.histogram import ConfidenceHistogram
from fathom.exits.observed import HALF_LIFE
from fathom.tuning.adaptive_replay import switch
from fathom.tuning.budget_replay import first_threshold, outcome
from fathom.tuning.rows import Measure, TraceRows, read_rows


def at_horizon(rows: TraceRows, budget: float, horizon: float) -> tuple[float, float, float]:
    """Realised cost, agreement, and the mean distance of a request's cost from the budget.

    Unlike ``budget_replay.live_exits`` it takes any horizon, and no stack is capped.
    """
    histogram = ConfidenceHistogram(half_life=HALF_LIFE)
    tracker = QuantileTracker(histogram, rows.source.exit_cost, horizon=horizon)
    pages = np.zeros((rows.num_requests, 2), int)
    _, places, counts = np.unique(rows.groups, return_inverse=True, return_counts=True)
    exits = np.zeros(len(rows), bool)
    first = first_threshold(rows, Measure(), budget)
    for row, (place, confidence) in enumerate(zip(places, rows.gap.tolist(), strict=True)):
        exited, decided = pages[place].tolist()
        threshold = tracker.threshold(budget, exited, decided)
        exits[row] = confidence > (first if threshold is None else threshold)
        histogram.add_one(confidence)
        tracker.refresh()
        pages[place] += (exits[row], 1)
        if pages[place, 1] == counts[place]:
            tracker.settle(budget, *pages[place].tolist())
    found = outcome(rows, exits)
    costs = 1 - pages[:, 0] / pages[:, 1] * (1 - rows.source.exit_cost)
    return found.realised, found.quality, float(np.abs(costs - budget).mean())


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path, help="trace")
    parser.add_argument("second", type=Path, help="trace of another workload")
    args = parser.parse_args()
    first, second = read_rows(args.first), read_rows(args.second)
    _, held_out = first.halves(0)
    print("budget, horizon: realised, agreement, a request's distance")
    for budget in (0.44, 0.62, 0.79):
        for horizon in (8, 16, 32, 64, math.inf):
            realised, quality, distance = at_horizon(held_out, budget, horizon)
            print(f"{budget:.2f} {horizon:>4}: {realised:.4f} {quality:.4f} {distance:.4f}")
    print("half-life, from: settled after (median), at most, within 500 rows, near")
    for half_life in (60, 80, 100, 150, 250, 400):
        for one, other in ((first, second), (second, first)):
            found = switch(one, other, Measure(), Method.EM, half_life=half_life).grid
            print(
                f"{half_life} {one.name}: {found.settled_after} {found.settled_worst} "
                f"{found.settled_in_time:.0%} {found.near:.0%}"
            )


if __name__ == "__main__":
    main()
