"""Measured costs of the stages, which the rules follow that say when to flush and to draft."""

from __future__ import annotations

import itertools
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PROBE_ROWS = (1, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of a pass by its number of rows, measured at a few row counts.

    Attributes:
        points: rows -> seconds, in ascending order of rows, at least one.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def measure(
        cls, run: Callable[[int], object], rows: tuple[int, ...] = PROBE_ROWS, repeats: int = 5
    ) -> CostCurve:
        """Time ``run(rows)`` at each row count: the median of ``repeats``, never falling.

        The row counts take turns, after one warm-up each, so that a disturbance does not settle on
        one of them.
        """
        for count in rows:
            run(count)
        seconds: dict[int, list[float]] = {count: [] for count in rows}
        for _ in range(repeats):
            for count in rows:
                start = time.perf_counter()
                run(count)
                seconds[count].append(time.perf_counter() - start)
        medians = [statistics.median(seconds[count]) for count in rows]
        # More rows are never less work; noise in one point must not say so.
        return cls(tuple(zip(rows, itertools.accumulate(medians, max), strict=True)))

    def __call__(self, rows: float) -> float:
        """Seconds of a pass over ``rows`` rows; linear between and beyond the points."""
        if rows <= 0:
            return 0.0
        xs = [x for x, _ in self.points]
        right = min(bisect_left(xs, rows), len(xs) - 1)
        if rows <= xs[0] or len(xs) == 1:
            return self.points[0][1] if rows <= xs[0] else self.points[0][1] * rows / xs[0]
        (x0, y0), (x1, y1) = self.points[right - 1], self.points[right]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    def as_dict(self) -> Mapping[int, float]:
        """Seconds by rows, as measured."""
        return dict(self.points)


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Measured seconds of one pass by rows.

    Attributes:
        shallow: layers [0, k) and the exit head.
        shallow_full: layers [0, k) alone, as mode ``full`` runs them.
        deep: layers [k, L) and the LM head.
    """

    shallow: CostCurve
    shallow_full: CostCurve
    deep: CostCurve
