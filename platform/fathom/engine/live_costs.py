"""Costs of the stages as they are now: measured at the start, and corrected by every pass since.

What a pass takes changes while a server runs: contexts grow, other processes take their share of
the machine. The rules that compare drafting with not drafting need both sides as they are now, and
in a pause only one of them is seen. So a correction has two parts, in logarithms:

    log seconds(curve, rows) = log measured(curve, rows) + common + own(curve, rows)

Every pass moves ``common``, which all passes share, and ``own`` at the measured row counts beside
its own. A step is bounded: a pass that was held up once says little about the next one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Protocol

from fathom.engine.costs import CostCurve, StageCosts

_COMMON_STEP, _OWN_STEP = 0.03, 0.05
"""Shares of what a pass differs by that the two parts of the correction take over."""

_LARGEST_ERROR = 0.5
"""What a pass differs by is cut to this, in nats: held up tenfold or twofold is the same news."""


class Curve(Protocol):
    """Seconds of a pass by rows."""

    def __call__(self, rows: float) -> float: ...


class Costs(Protocol):
    """Seconds of the stages' passes, as ``StageCosts`` measured them or as they are now."""

    @property
    def shallow(self) -> Curve:
        """Layers [0, k) and the exit head."""

    @property
    def shallow_full(self) -> Curve:
        """Layers [0, k) alone."""

    @property
    def deep(self) -> Curve:
        """Layers [k, L) and the LM head."""


class _Common:
    """The part of the correction that the curves share, in nats."""

    def __init__(self) -> None:
        self.value = 0.0


class LiveCurve:
    """A measured curve with corrections."""

    def __init__(self, measured: CostCurve, common: _Common) -> None:
        self._measured = measured
        self._common = common
        self._rows = [rows for rows, _ in measured.points]
        self._own = [0.0] * len(self._rows)

    @property
    def most_rows(self) -> int:
        """The largest row count that was measured."""
        return self._rows[-1]

    def __call__(self, rows: float) -> float:
        """Seconds of a pass over ``rows`` rows, as passes are now."""
        measured = self._measured(rows)
        return measured * math.exp(self._common.value + self._own_at(rows)) if measured else 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Take in what a pass took."""
        expected = self(rows)
        if expected <= 0 or seconds <= 0:
            return
        error = math.log(seconds / expected)
        error = max(-_LARGEST_ERROR, min(_LARGEST_ERROR, error))
        self._common.value += _COMMON_STEP * error
        for index, weight in self._beside(rows):
            self._own[index] += _OWN_STEP * weight * error

    def _own_at(self, rows: float) -> float:
        return sum(weight * self._own[index] for index, weight in self._beside(rows))

    def _beside(self, rows: float) -> list[tuple[int, float]]:
        """The measured points beside a row count, with their weights, which add up to 1."""
        right = bisect_left(self._rows, rows)
        if right == 0 or right == len(self._rows):
            return [(min(right, len(self._rows) - 1), 1.0)]
        low, high = self._rows[right - 1], self._rows[right]
        share = (rows - low) / (high - low)
        return [(right - 1, 1 - share), (right, share)]


class LiveCosts:
    """``StageCosts`` that follow the passes of an engine."""

    def __init__(self, measured: StageCosts) -> None:
        self._common = _Common()
        self.shallow = LiveCurve(measured.shallow, self._common)
        self.shallow_full = LiveCurve(measured.shallow_full, self._common)
        self.deep = LiveCurve(measured.deep, self._common)

    @property
    def drift(self) -> float:
        """How long passes take over what they took at the start, all of them together."""
        return math.exp(self._common.value)
