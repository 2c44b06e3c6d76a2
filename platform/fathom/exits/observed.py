"""What an engine has seen of one confidence measure, and the thresholds in that."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from fathom.exits.beta_mixture import GRID, START, BetaMixture, Steps, em_steps, fit_moments
from fathom.exits.budget import QuantileTracker
from fathom.exits.histogram import ConfidenceHistogram, Kind

HALF_LIFE = 80.0
"""Rows after which what was seen counts half: after a switch of the hardest two workloads that were
tried, λ is where it belongs within 432 rows (`experiments/policies`); at 150, within 1,200."""

REFIT = 64
"""Rows from one fit of the mixture to the next, so that a token's share of one is small. A fit is
spread over rows, a piece at each, so that no step waits for all of it."""

_HISTORY = 512
_DONE = object()

_LEVELS = np.linspace(0.05, 0.95, 19)
"""Quantiles that λ is chosen from, for measures that FREE's grid does not fit."""


class Observed:
    """Rows of one measure, by what the deep stage said of them.

    Counts of this engine and those of others are kept apart, for the others' are replaced whole.

    Args:
        exit_cost: see ``QuantileTracker``. estimator: "em" or "moments" (``beta_mixture``).
        by_quantiles: choose λ from quantiles of what was seen, not from FREE's grid of [0.3, 0.9],
            which is made for the softmax gap: saturation, say, may never be below 0.9.
        half_life: in rows; see ``ConfidenceHistogram``.

    Attributes:
        own: counts of this engine's rows, which are what it tells others.
        counted: [3] rows ever, by ``Kind``; none is forgotten here.
        mixture: the latest fit, or None. adaptive: λ that follows from it, 0.9 at first.
        history: rows seen, and λ then; of the latest 512 fits.
    """

    def __init__(
        self,
        exit_cost: float,
        *,
        estimator: str,
        half_life: float = HALF_LIFE,
        by_quantiles: bool = False,
    ) -> None:
        self.own = ConfidenceHistogram(half_life=half_life)
        self.counted = [0] * len(Kind)
        self.mixture: BetaMixture | None = None
        self.adaptive = START
        self.history: deque[tuple[int, float]] = deque(maxlen=_HISTORY)
        self._all = ConfidenceHistogram(half_life=half_life)
        self._tracker = QuantileTracker(self._all, exit_cost)
        self._moments = estimator == "moments"
        self._by_quantiles = by_quantiles
        self._fitted_at = 0
        self._fit: Steps[None] | None = None
        self._asked = False

    def add(self, confidence: float, agrees: bool | None) -> None:
        """Note one row; see ``ConfidenceHistogram.add_one``.

        Thresholds are worked out here, a piece a row, and not where a token asks for one: most
        rows are told of beside a deep pass, several times as long as the step that drafts.
        """
        self.own.add_one(confidence, agrees)
        self._all.add_one(confidence, agrees)
        self.counted[Kind.UNLABELLED if agrees is None else int(agrees)] += 1
        self._tracker.refresh()
        if self._fit is not None and next(self._fit, _DONE) is _DONE:
            self._fit = None

    def replace_others(self, others: Iterable[ConfidenceHistogram], missed: float = 0.0) -> None:
        """Take what other engines have seen in place of what they had before.

        Args:
            missed: rows that each of them saw, on average, while this one saw none: it forgets as
                if it had seen as many.
        """
        if missed:
            self.own.forget(missed)
        self._all = sum(others, start=self.own + ConfidenceHistogram(self.own.bins))
        self._tracker.follow(self._all)
        if self._asked:
            self._begin_fit()
            self._finish_fit()  # no step waits for this

    def threshold(self, start: float | None) -> float:
        """λ of policy ``adaptive``; asks for a fit where enough was seen since the last one.

        Args:
            start: what to take before there is a fit; None takes 0.9.
        """
        if self._fit is None and self._all.seen - self._fitted_at >= REFIT:
            self._begin_fit()
            if not self._asked:
                self._finish_fit()  # rows that came before are told of now
        self._asked = True
        if start is not None and (self.mixture is None or self.mixture.fallback):
            return start
        return self.adaptive

    def _begin_fit(self) -> None:
        self._fitted_at = self._all.seen
        self._fit = self._fit_pieces()

    def _finish_fit(self) -> None:
        if self._fit is not None:
            for _ in self._fit:
                pass
            self._fit = None

    def _fit_pieces(self) -> Steps[None]:
        """Fit the mixture to what was seen by now, and take λ from it."""
        everything = self._all
        if self._moments:
            self.mixture = fit_moments(everything)
        else:
            self.mixture = yield from em_steps(everything, self.mixture)
        yield
        grid = everything.quantile(_LEVELS) if self._by_quantiles else GRID
        self.adaptive = self.mixture.threshold(grid=grid)
        self.history.append((self._fitted_at, self.adaptive))

    def quantile(self, budget: float, exited: int, decided: int) -> float | None:
        """λ of policy ``budget``; see ``QuantileTracker.threshold``."""
        return self._tracker.threshold(budget, exited, decided)

    def settle(self, budget: float, exited: int, decided: int) -> None:
        """Note what a request of policy ``budget`` has spent; see ``QuantileTracker.settle``."""
        self._tracker.settle(budget, exited, decided)

    def snapshot(self) -> dict[str, Any]:
        """The state as JSON can hold it; ``histogram`` is what others add to theirs."""
        return {
            "histogram": self.own.to_dict(),
            "rows": {kind.name.lower(): self.counted[kind] for kind in Kind},
            "mixture": None if self.mixture is None else dataclasses.asdict(self.mixture),
            "adaptive_threshold": self.adaptive,
            "history": [list(entry) for entry in self.history],
        }
