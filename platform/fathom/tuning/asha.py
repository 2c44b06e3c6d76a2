"""ASHA over rows: trials begin on few, and those that fall behind never see them all.

Asynchronous successive halving (Li et al. 2020, "A system for massively parallel hyperparameter
tuning"), by Ray Tune's scheduler. A rung is a share of each trace's rows; a trial that is not among
the best 1 / reduction_factor of those that have come to a rung so far is stopped there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fathom.settings import ConfigError
from fathom.tuning.ledger import Trial
from fathom.tuning.objective import Figures, first_rows
from fathom.tuning.rows import TraceRows
from fathom.tuning.study import Scheduler, Study

if TYPE_CHECKING:
    from ray.tune.schedulers import ASHAScheduler

Parts = Sequence[tuple[TraceRows, TraceRows]]

STANDING, SHARE = "standing", "share"
"""What a result must have for the scheduler: ``standing``, and the rung's share of the rows beside
the lowest one's, a whole number."""


def rungs(study: Study, parts: Parts) -> list[list[tuple[TraceRows, TraceRows]]]:
    """What ``evaluate`` takes at each rung: growing shares of the rows, the last all of them.

    Requests stay whole, and each rung has those of the one below. Without a scheduler there is
    one rung.

    Raises:
        ConfigError: for traces too short for two rungs.
    """
    if study.scheduler is not Scheduler.ASHA:
        return [list(parts)]
    factor, least = study.asha.reduction_factor, study.asha.first_rows
    shortest = min(len(rows) for _, rows in parts)
    count = 1
    while shortest // factor**count >= least:
        count += 1
    if count == 1:
        raise ConfigError(
            f"asha.first_rows {least} is too many for a trace of which trials are replayed on "
            f"{shortest} rows: the second rung has {factor} times the first one's; lower it to "
            f"{max(1, shortest // factor)}."
        )
    shares = [factor ** (count - 1 - level) for level in range(count)]
    return [
        [(_share(first, share), _share(rows, share)) for first, rows in parts] for share in shares
    ]


def _share(rows: TraceRows, share: int) -> TraceRows:
    return rows if share == 1 else first_rows(rows, -(-len(rows) // share))


def standing(study: Study, figures: Figures) -> float:
    """What trials are compared by, to be made small: feasible ones first (Deb 2000).

    A trial that keeps to the constraints stands in [0, 1) by its loss; any other above, by the sum
    of what it misses of them, as shares of their limits.
    """
    missed = [
        value / getattr(study.constraints, name)
        for name, value in figures.violations(study).items()
        if value > 0
    ]
    if missed:
        return 1 + sum(missed)
    (loss,) = figures.losses(study)
    return loss / (1 + loss)


def scheduler(
    study: Study, levels: int, known: Sequence[Sequence[Trial]] = ()
) -> ASHAScheduler | None:
    """Ray's scheduler for a study that has one.

    Args:
        levels: number of rungs.
        known: of each trial that an earlier search has ended, its results from the lowest rung on:
            a new scheduler would let the first ones pass.
    """
    if study.scheduler is not Scheduler.ASHA:
        return None
    from ray.tune.schedulers import ASHAScheduler  # takes seconds

    factor = study.asha.reduction_factor
    own = ASHAScheduler(
        time_attr=SHARE,
        metric=STANDING,
        mode="min",
        grace_period=1,
        max_t=factor ** (levels - 1),
        reduction_factor=factor,
    )
    controller: Any = None  # which it never looks at
    for number, results in enumerate(known):
        trial: Any = _Known(f"known-{number}")
        own.on_trial_add(controller, trial)
        for level, result in enumerate(results):
            figures = {SHARE: factor**level, STANDING: standing(study, result.figures)}
            own.on_trial_result(controller, trial, figures)
        own.on_trial_remove(controller, trial)
    return own


@dataclass(frozen=True, slots=True)
class _Known:
    """What the scheduler asks of a trial: its name."""

    trial_id: str
