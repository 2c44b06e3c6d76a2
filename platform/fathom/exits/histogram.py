"""What a policy remembers of the rows it has seen: decayed counts of confidences.

Three kinds of rows are counted apart: those that the deep stage disagreed with, those that it
agreed with, and those that it never looked at. The counts are all that the beta mixture, the
quantiles and the figures need, and the counts of several replicas add up.

Bins are of equal width in u = (2 / pi) * arcsin(sqrt(c)), the scale on which binomial shares have
equal spread. Most tokens of a good exit have a confidence near 1, and equal bins of c would put
them all into the last one; here its width is 4e-5 with 256 bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 256
_NORMALIZE_AT = 1e60


class Kind(IntEnum):
    """Rows of ``ConfidenceHistogram.counts``."""

    DISAGREES = 0
    AGREES = 1
    UNLABELLED = 2


class ConfidenceHistogram:
    """Counts of confidences by kind.

    Args:
        bins: how many, at least 2.
        half_life: rows after which a count is worth half; None forgets nothing. It is rows that
            count here, not their weights.

    Attributes:
        seen: rows that were ever added, forgotten or not.

    Raises:
        ValueError: for fewer than 2 bins, or a half-life that is not above 0.
    """

    def __init__(self, bins: int = BINS, half_life: float | None = None) -> None:
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}.")
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be above 0 rows, or None, got {half_life}.")
        self.bins = bins
        self.half_life = half_life
        self.seen = 0
        self._counts = np.zeros((len(Kind), bins))
        # Instead of shrinking all counts at each row, a new row weighs more than the one before;
        # ``_scale`` is the weight of the newest.
        self._scale = 1.0
        self._growth = 1.0 if half_life is None else 2.0 ** (1 / half_life)
        self._per_radian = 2 * bins / math.pi

    def add_one(self, confidence: float, agrees: bool | None = None, weight: float = 1.0) -> None:
        """Count one row; fast enough to be called for every token.

        Args:
            confidence: in [0, 1]; clipped to it. One that is not a number is left out.
            agrees: whether the deep stage chose the draft; None where it was not asked.
            weight: of the row, at least 0: 1 / p for one that was picked with probability p.
        """
        if confidence != confidence:
            return
        self.seen += 1
        self._scale *= self._growth
        if self._scale > _NORMALIZE_AT:
            self._normalize()
        root = math.sqrt(min(max(confidence, 0.0), 1.0))
        place = min(int(math.asin(root) * self._per_radian), self.bins - 1)
        kind = 2 if agrees is None else int(agrees)
        self._counts[kind, place] += weight * self._scale

    def add(
        self, confidence: ArrayLike, agrees: ArrayLike | None = None, weight: ArrayLike = 1.0
    ) -> None:
        """Count rows in order; as ``add_one`` for each.

        Args:
            confidence: [n] float. agrees: [n] bool, or None where nobody was asked.
            weight: [n] float, or one for all.

        Raises:
            ValueError: for arrays of different lengths.
        """
        c = np.atleast_1d(np.asarray(confidence, dtype=np.float64))
        w = np.broadcast_to(np.asarray(weight, dtype=np.float64), c.shape)
        kinds = np.full(c.shape, int(Kind.UNLABELLED))
        if agrees is not None:
            kinds = np.broadcast_to(np.asarray(agrees, dtype=bool), c.shape).astype(np.int64)
        known = ~np.isnan(c)
        c, w, kinds = c[known], w[known], kinds[known]
        if not len(c):
            return
        self.seen += len(c)
        age = np.arange(len(c) - 1, -1, -1)
        decay = 1.0 if self.half_life is None else 0.5 ** (len(c) / self.half_life)
        self._normalize(decay)
        w = w if self.half_life is None else w * 0.5 ** (age / self.half_life)
        places = kinds * self.bins + self._places(c)
        added = np.bincount(places, weights=w, minlength=self._counts.size)
        self._counts += added.reshape(self._counts.shape)

    def _places(self, confidence: NDArray[np.float64]) -> NDArray[np.int64]:
        radians = np.arcsin(np.sqrt(np.clip(confidence, 0, 1)))
        places = (radians * self._per_radian).astype(np.int64)
        return np.minimum(places, self.bins - 1)

    def _normalize(self, decay: float = 1.0) -> None:
        self._counts *= decay / self._scale
        self._scale = 1.0

    def forget(self, rows: float) -> None:
        """Forget as if so many rows had come, at least 0; nothing without a half-life."""
        if self.half_life is not None:
            self._normalize(0.5 ** (rows / self.half_life))

    @property
    def counts(self) -> NDArray[np.float64]:
        """[3, bins] float64: what is remembered, by ``Kind``; the newest row counts its weight."""
        return self._counts / self._scale

    @property
    def totals(self) -> NDArray[np.float64]:
        """[3] float64: ``counts`` of each ``Kind`` over all bins."""
        totals: NDArray[np.float64] = self.counts.sum(axis=1)
        return totals

    @property
    def edges(self) -> NDArray[np.float64]:
        """[bins + 1] float64: confidences from 0 to 1 at which bins begin and end."""
        return edges(self.bins)

    @property
    def centres(self) -> NDArray[np.float64]:
        """[bins] float64: confidences at the middle of the bins, on the bins' own scale."""
        middle: NDArray[np.float64] = np.sin(np.pi / 2 * (np.arange(self.bins) + 0.5) / self.bins)
        return middle**2

    def quantile(self, share: ArrayLike) -> NDArray[np.float64]:
        """Confidences below which these shares of all rows lie.

        Args:
            share: in [0, 1], any shape.

        Returns:
            float64 of the same shape, interpolated within a bin; NaN where nothing was counted.
        """
        wanted = np.asarray(share, dtype=np.float64)
        below = np.concatenate([[0.0], self.counts.sum(axis=0).cumsum()])
        if not below[-1] > 0:
            return np.full(wanted.shape, np.nan)
        # On the bins' own scale, where they are of equal width.
        found = np.interp(wanted * below[-1], below, np.linspace(0, 1, self.bins + 1))
        return np.asarray(np.sin(np.pi / 2 * found) ** 2)

    def share_above(self, threshold: float) -> float:
        """Share of all rows with a confidence above a threshold; NaN where nothing was counted."""
        counts = self.counts.sum(axis=0)
        total = counts.sum()
        if not total > 0:
            return math.nan
        at = math.asin(math.sqrt(min(max(threshold, 0.0), 1.0))) * self._per_radian
        place = min(int(at), self.bins - 1)
        inside = counts[place] * (1 - (at - place))
        return float((counts[place + 1 :].sum() + inside) / total)

    def __add__(self, other: ConfidenceHistogram) -> ConfidenceHistogram:
        """What two have seen together; it forgets as the left one does.

        Raises:
            ValueError: if their bins differ.
        """
        if self.bins != other.bins:
            raise ValueError(f"bins must be equal to be added, got {self.bins} and {other.bins}.")
        both = ConfidenceHistogram(self.bins, self.half_life)
        both.seen = self.seen + other.seen
        both._counts = self.counts + other.counts
        return both

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "bins": self.bins,
            "half_life": self.half_life,
            "seen": self.seen,
            "counts": self.counts.tolist(),
        }

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> ConfidenceHistogram:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: for a field that is missing or out of place.
        """
        try:
            made = ConfidenceHistogram(int(body["bins"]), body["half_life"])
            made.seen = int(body["seen"])
            rows = body["counts"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"no histogram of confidences: {error!r}.") from error
        try:
            counts = np.array(rows, dtype=np.float64)
        except (TypeError, ValueError):
            counts = np.empty(0)
        if counts.shape != made._counts.shape or not (np.isfinite(counts) & (counts >= 0)).all():
            raise ValueError(
                f"counts must be {len(Kind)} rows of {made.bins} numbers of at least 0 each."
            )
        made._counts = counts
        return made


def edges(bins: int = BINS) -> NDArray[np.float64]:
    """[bins + 1] float64: confidences from 0 to 1 at which bins of a histogram begin and end."""
    ends: NDArray[np.float64] = np.sin(np.pi / 2 * np.linspace(0, 1, bins + 1)) ** 2
    return ends
