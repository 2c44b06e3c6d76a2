"""Policy ``budget`` replayed over a trace's held-out requests, beside other ways to spend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fathom.compute import AcceptMode, ComputePolicy, PolicyName
from fathom.exits.aggregation import quantile_thresholds
from fathom.exits.budget import exit_share
from fathom.exits.live import LivePolicies, most_exits
from fathom.tuning.rows import Bools, Floats, Measure, TraceRows

MAX_STACK = 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """What spending a budget gave on held-out rows.

    Attributes:
        realised: mean cost of a token, as a share of a full one's.
        quality: share of tokens that are the full model's, in its own contexts.
    """

    realised: float
    quality: float


def outcome(rows: TraceRows, exits: Bools) -> Outcome:
    """What rows give of which these leave at the exit."""
    cost = 1 - exits.mean() * (1 - rows.source.exit_cost)
    return Outcome(float(cost), float(1 - (exits & ~rows.agrees).mean()))


def targets(exit_cost: float, count: int = 8) -> list[float]:
    """Budgets spread evenly over what can be asked for, two decimals each.

    A full stack takes a token at full depth with it, so the exit's own cost is out of reach.
    """
    smallest = 1 - most_exits(ComputePolicy(max_stack=MAX_STACK)) * (1 - exit_cost)
    return [round(smallest + (1 - smallest) * (i + 0.5) / count, 2) for i in range(count)]


def live_exits(
    rows: TraceRows,
    measure: Measure,
    budget: float,
    *,
    first: float | None = None,
    max_stack: int = MAX_STACK,
    mode: AcceptMode = AcceptMode.FREE,
) -> Bools:
    """Which rows leave under policy ``budget`` as an engine runs it; see ``live_rows``."""
    exits, _ = live_rows(rows, measure, budget, first=first, max_stack=max_stack, mode=mode)
    return exits


def live_rows(
    rows: TraceRows,
    measure: Measure,
    budget: float,
    *,
    first: float | None,
    max_stack: int,
    mode: AcceptMode = AcceptMode.FREE,
) -> tuple[Bools, Floats]:
    """Which rows leave under policy ``budget`` as an engine runs it, in the trace's order.

    ``LivePolicies`` decides and learns; a sequence's stack is bounded as in the engine, where its
    deep stage would answer after each row that stays.

    In mode ``exact`` a draft that the full model disagrees with has not left after all, as far as
    the budget goes, and so more rows are let go: those count here, right or wrong. The verdict is
    taken to come at once; in the engine up to ``max_stack`` rows behind the draft are decided (and
    thrown away) before it. Nor is the exit asked for a request's first token.

    Args:
        first: λ until the policy has seen enough. max_stack: most drafts of a stack.
        mode: ``free`` or ``exact``.

    Returns:
        [n] whether the row leaves; [n] λ that it met, NaN where the exit was not asked.
    """
    compute = measure.policy(
        mode=mode,
        policy=PolicyName.BUDGET,
        budget=budget,
        exit_threshold=first,
        max_stack=max_stack,
    )
    holds = compute.holds_drafts
    policies = LivePolicies(rows.source.exit_cost)
    policies.check(compute)
    exits = np.zeros(len(rows), bool)
    thresholds = np.full(len(rows), np.nan)
    spent: dict[int, list[int]] = {}  # of a request: exited, decided, drafts on its stack, wrong
    counts = np.bincount(rows.groups).tolist()
    values = zip(rows.groups.tolist(), measure.of(rows).tolist(), rows.agrees.tolist(), strict=True)
    for row, (group, confidence, agrees) in enumerate(values):
        page = spent.setdefault(group, [0, 0, 0, 0])
        if page[2] < max_stack and not (holds and page[1] == 0):
            threshold = policies.threshold_for(compute, page[0], page[1])
            thresholds[row] = compute.threshold if threshold is None else threshold
            leaves = confidence > thresholds[row]
            policies.observe(compute, confidence, agrees)
        else:
            leaves = False  # nor is the exit asked
        exits[row] = leaves
        stands = leaves and (agrees or not holds)
        page[0] += stands
        page[1] += 1
        page[2] = page[2] + 1 if stands else 0
        page[3] += leaves and not agrees
        if page[1] == counts[group]:
            policies.completed(
                compute, exited=page[0], decided=page[1], asked=page[1], wrong=page[3]
            )
    return exits, thresholds


def first_threshold(rows: TraceRows, measure: Measure, budget: float) -> float:
    """λ above which so many calibration rows lie that the budget is spent."""
    share = exit_share(budget, rows.source.exit_cost)
    return float(np.nanquantile(measure.of(rows), 1 - share, method="inverted_cdf"))


def spend(
    calibration: TraceRows, held_out: TraceRows, measure: Measure, budget: float, seed: int
) -> dict[str, Outcome]:
    """Every way to spend one budget, set up on the calibration rows.

    With one exit before the last, EERO's thresholds, one global threshold and MSDNet's are the
    same quantile; what ``live`` adds is that it follows the rows and each request's own spending.

    Returns:
        ``live``, the policy; ``static``: requests at random, whole, at the exit or at full depth;
        ``global``: one threshold, tuned to the budget on the calibration rows; ``msdnet``: shares
        of MSDNet's budgeted batches (Huang et al. 2018, section 5.2) by quantiles; ``random``:
        tokens at random. No other way has the bound on the stack, and none but ``live`` learns.
    """
    share = exit_share(budget, held_out.source.exit_cost)
    random = np.random.default_rng(seed)
    first = first_threshold(calibration, measure, budget)
    confidence = measure.of(held_out)
    # Whole requests, shuffled, until the share of tokens is spent: equal cost to within a request.
    names, counts = np.unique(held_out.groups, return_counts=True)
    order = random.permutation(len(names))
    total = counts[order].cumsum()
    shallow = names[order[total <= share * len(held_out) + counts.mean() / 2]]
    ways: dict[str, Callable[[], Bools]] = {
        "live": partial(live_exits, held_out, measure, budget, first=first),
        "static": lambda: np.isin(held_out.groups, shallow),
        "global": lambda: confidence > _tuned(calibration, measure, budget),
        "msdnet": lambda: confidence >= _msdnet(measure.of(calibration), share),
        "random": lambda: random.random(len(held_out)) < share,
    }
    return {name: outcome(held_out, np.asarray(way())) for name, way in ways.items()}


def _tuned(rows: TraceRows, measure: Measure, budget: float) -> float:
    """The highest threshold at which the calibration rows cost no more than the budget."""
    confidence = measure.of(rows)
    values = np.unique(confidence[~np.isnan(confidence)])
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if outcome(rows, confidence > values[middle]).realised <= budget:
            low = middle
        else:
            high = middle - 1
    return float(values[low])


def _msdnet(confidence: Floats, share: float) -> float:
    """MSDNet's shares are 1, 1 - q, (1 - q)^2, ... of one another, normalized; of two exits any
    share can be had, and its threshold is the quantile of it, tied rows included.
    """
    both = np.stack([confidence, np.ones_like(confidence)], axis=1)
    thresholds, _ = quantile_thresholds(both, [share, 1 - share])
    return float(thresholds[0])
