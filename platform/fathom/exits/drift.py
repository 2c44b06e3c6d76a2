"""Has traffic moved away from what an operating point was measured on?

Two questions are asked of every completion, for completions resemble each other less than tokens of
one do:

- *agreement*: is the mean share of tokens that are not the full model's at most what was promised?
- *confidences*: at some thresholds, is the mean share of rows above them what it was, within a
  tolerance? Looked at in both directions.

Each is tested by betting (``risk.RiskMonitor``): the evidence is a nonnegative supermartingale of
mean 1 while the answer is yes, so that by Ville's inequality it ever reaches 1 / α with probability
at most α, however long one looks (Ramdas, Grünwald, Vovk and Shafer 2023). The evidence of several
thresholds is their mean, which is again one. Both tests share α half and half.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.exits.histogram import edges
from fathom.exits.risk import RiskMonitor
from fathom.exits.shadow import BINS, Shadowed, measure_name
from fathom.types import ComputePolicy

Floats = NDArray[np.float64]

AGREEMENT, CONFIDENCES = "agreement", "confidences"
"""Names of the two tests."""

RETURN_AFTER = 100
"""Completions that must look as measured, on average, before an alarm is over."""

_FIELDS = ("asked", "decided", "wrong", "exited", "layer_tokens", "check_layer_tokens")
TOTALS = ("completions", *_FIELDS)
"""Figures of a point that only grow."""

_HALF_LIFE = 200.0
"""Completions after which figures for readers (not the tests) count half."""

_GROUPS = 8
_GROUP_EDGES: list[float] = edges(_GROUPS).tolist()
"""Of the agreement by confidence that readers are told."""

_LEAST_SHARE = 1e-4
"""Of a bin, for the population stability index."""


@dataclass(frozen=True, slots=True)
class Level:
    """A threshold of confidence, and the mean share of a completion's rows above it.

    Attributes:
        bin: of ``shadow.BINS``: the threshold is its lower edge. share: as measured.
        tolerance: by which the mean may differ without an alarm.
    """

    bin: int
    share: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Expected:
    """What an operating point was measured on, as far as drift is told by it.

    Attributes:
        compute: the point's settings; a completion with others is none of its.
        loss: δ: the largest mean share of tokens that may differ from the full model's. None where
            nobody has measured it.
        agreement, exit_rate: as measured, or None.
        measure: name of the confidence that ``levels`` and ``shares`` are of.
        levels: see ``Level``; none where the point goes by another confidence.
        shares: [BINS] of the measured rows by confidence; empty as ``levels``.
    """

    compute: ComputePolicy | None = None
    loss: float | None = None
    agreement: float | None = None
    exit_rate: float | None = None
    measure: str = ""
    levels: tuple[Level, ...] = ()
    shares: tuple[float, ...] = ()


class _Tests:
    """Both tests, from their start on."""

    def __init__(self, expected: Expected, alpha: float) -> None:
        # RiskMonitor's own alarm is not used; its rate is only checked there.
        self.agreement = None if expected.loss is None else RiskMonitor(expected.loss)
        self._alpha = alpha
        self._sides: list[tuple[Level, bool, RiskMonitor]] = []
        for level in expected.levels:
            for above, share in ((True, level.share), (False, 1 - level.share)):
                bound = share + level.tolerance
                if bound < 1:  # else nothing can exceed it
                    self._sides.append((level, above, RiskMonitor(bound)))

    def observe(self, loss: float, tail: Sequence[float] | None) -> None:
        """Take in one completion.

        Args:
            tail: of each bin, the share of its rows there or above; None for another measure's.
        """
        if self.agreement is not None:
            self.agreement.observe(loss)
        if tail is None:
            return
        for level, above, monitor in self._sides:
            share = tail[level.bin]
            monitor.observe(share if above else 1 - share)

    @property
    def evidence(self) -> dict[str, float]:
        """Of each test that there is; 1 at first."""
        found = {}
        if self.agreement is not None:
            found[AGREEMENT] = self.agreement.evidence
        if self._sides:
            every = [monitor.evidence for _, _, monitor in self._sides]
            found[CONFIDENCES] = sum(every) / len(every)
        return found

    @property
    def reasons(self) -> list[str]:
        """The tests whose evidence is enough for an alarm; together false at most at rate α."""
        tests = self.evidence
        return [name for name, value in tests.items() if value >= len(tests) / self._alpha]


class PointWatch:
    """Watches one operating point.

    An alarm lasts until the latest ``RETURN_AFTER`` completions, all after it was raised, are as
    measured on average: their loss at most δ and every level within its tolerance. Both tests then
    begin anew. So a false alarm has probability at most α between the start, or an all-clear, and
    the next; about half of the time a mean that lies exactly on a bound is taken as returned.

    Args:
        expected: nothing to compare with where it says nothing; then there is never an alarm.
        alpha: α in (0, 1).

    Attributes:
        totals: of completions, and of the fields of ``Shadowed`` that add up.
        alarms: raised so far.
        reasons: names of the tests that have raised the alarm; empty without one.
    """

    def __init__(self, expected: Expected, alpha: float) -> None:
        self.expected = expected
        self.totals = dict.fromkeys(TOTALS, 0)
        self.alarms = 0
        self.reasons: tuple[str, ...] = ()
        self._alpha = alpha
        self._tests = _Tests(expected, alpha)
        self._latest: deque[tuple[float, list[float] | None]] = deque(maxlen=RETURN_AFTER)
        self._keep = 0.5 ** (1 / _HALF_LIFE)
        self._sums = np.zeros(4)  # tokens, wrong, exited, layer-tokens; decayed, as all below
        self._by_bin = np.zeros((3, BINS))  # rows, those that were judged, those that agree

    def observe(self, completion: Shadowed) -> bool:
        """Take one completion into account; returns whether the alarm was raised or ended by it."""
        if not completion.decided:
            return False
        self.totals["completions"] += 1
        for field in _FIELDS:
            self.totals[field] += getattr(completion, field)
        self._sums *= self._keep
        self._sums += (
            completion.decided,
            completion.wrong,
            completion.exited,
            completion.layer_tokens,
        )
        self._by_bin *= self._keep
        compute = completion.compute
        judged = [0] * BINS if compute.copies_states else completion.rows
        self._by_bin += (completion.rows, judged, completion.agreed)
        loss = completion.wrong / completion.decided
        name = measure_name(compute.confidence, compute.exit_temperature)
        tail = None
        if completion.asked and name == self.expected.measure:
            counts = np.asarray(completion.rows, dtype=np.float64)
            tail = (counts[::-1].cumsum()[::-1] / completion.asked).tolist()
        self._latest.append((loss, tail))
        if self.reasons:  # the evidence is in; it would grow beyond all numbers
            return self._end_alarm()
        self._tests.observe(loss, tail)
        return self._raise_alarm()

    def _raise_alarm(self) -> bool:
        self.reasons = tuple(self._tests.reasons)
        if not self.reasons:
            return False
        self.alarms += 1
        self._latest.clear()
        return True

    def _end_alarm(self) -> bool:
        if len(self._latest) < RETURN_AFTER:
            return False
        expected = self.expected
        if expected.loss is not None:
            loss = sum(each for each, _ in self._latest) / len(self._latest)
            if loss > expected.loss:
                return False
        tails = [tail for _, tail in self._latest if tail is not None]
        for level in expected.levels if tails else ():
            share = sum(tail[level.bin] for tail in tails) / len(tails)
            if abs(share - level.share) > level.tolerance:
                return False
        self.reasons = ()
        self._tests = _Tests(expected, self._alpha)
        return True

    @property
    def psi(self) -> float | None:
        """Population stability index of the latest confidences, over tenths of those measured.

        The sum of (live - measured) * ln(live / measured); by custom, above 0.1 is a change, above
        0.25 a great one. None where there is nothing to compare.
        """
        measured, live = np.asarray(self.expected.shares), self._by_bin[0]
        if not len(measured) or not live.sum():
            return None
        tenths = np.minimum((measured.cumsum() - measured / 2) * 10, 9.99).astype(int)
        p = np.bincount(tenths, weights=measured, minlength=10)
        q = np.bincount(tenths, weights=live / live.sum(), minlength=10)
        used = p > 0
        p, q = np.maximum(p[used], _LEAST_SHARE), np.maximum(q[used], _LEAST_SHARE)
        return float(((q - p) * np.log(q / p)).sum())

    def figures(self) -> dict[str, Any]:
        """What was seen, as JSON can hold it: ratios are of the latest few hundred completions."""
        tokens, wrong, exited, layers = self._sums.tolist()
        some = max(tokens, 1e-9)
        expected = self.expected
        _, judged, agreed = self._by_bin
        return {
            **self.totals,
            "agreement": 1 - wrong / some if tokens else None,
            "exit_rate": exited / some if tokens else None,
            "layers_per_token": layers / some if tokens else None,
            "psi": self.psi,
            "expected": {
                "agreement": expected.agreement,
                "least_agreement": None if expected.loss is None else 1 - expected.loss,
                "exit_rate": expected.exit_rate,
            },
            "evidence": self._tests.evidence,
            "alert": bool(self.reasons),
            "reasons": list(self.reasons),
            "alarms": self.alarms,
            "by_confidence": [
                {"from": low, "to": high, "rows": n, "agreement": a / n}
                for low, high, n, a in zip(
                    _GROUP_EDGES, _GROUP_EDGES[1:], *map(_grouped, (judged, agreed)), strict=False
                )
                if n > 0
            ],
        }


def _grouped(counts: Floats) -> list[float]:
    found: list[float] = counts.reshape(_GROUPS, -1).sum(axis=1).tolist()
    return found
