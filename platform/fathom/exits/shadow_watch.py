"""What the shadow of all replicas says, by operating point."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from fathom.exits.drift import Expected, PointWatch
from fathom.exits.shadow import Shadowed
from fathom.types import ComputePolicy

logger = logging.getLogger("fathom.shadow")

DEFAULT, OTHER = "default", "other"
"""Names under which requests are watched that name no operating point: with the server's own
settings, and with any others."""

_MOST_EARLY = 4096
"""Completions that wait until it is known what to expect of them."""


class ShadowWatch:
    """Watches every operating point. Not thread-safe.

    Args:
        alpha: rate of false alarms of each point; see ``PointWatch``.

    Attributes:
        completions: taken in so far.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._expected: dict[str, Expected] | None = None
        self._early: deque[Shadowed] = deque(maxlen=_MOST_EARLY)
        self._points: dict[str, PointWatch] = {}
        self.completions = 0

    def expect(self, expected: Mapping[str, Expected]) -> None:
        """Take what points were measured on; one that means something else now begins anew."""
        before, self._expected = self._expected or {}, dict(expected)
        for name in before.keys() | expected.keys():
            if before.get(name) != expected.get(name):
                self._points.pop(name, None)
        early = list(self._early)
        self._early.clear()
        self.take(early)

    def take(self, completions: Iterable[Shadowed]) -> None:
        """Take in completions that have ended; tell the log of alarms.

        Those that come before anything is expected wait for that.
        """
        if self._expected is None:
            self._early.extend(completions)
            return
        for each in completions:
            self.completions += 1
            name = self._name_of(each)
            watch = self._points.get(name)
            if watch is None:
                watch = PointWatch(self._expected.get(name, Expected()), self._alpha)
                self._points[name] = watch
            if watch.observe(each):
                _tell(name, watch)

    def _name_of(self, completion: Shadowed) -> str:
        """The point whose settings a completion has had, whatever its request has named."""
        name = completion.point or DEFAULT
        expected = (self._expected or {}).get(name)
        if expected is None or expected.compute is None:
            return OTHER
        same = _but_for_load(completion.compute) == _but_for_load(expected.compute)
        return name if same else OTHER

    @property
    def alert(self) -> bool:
        """Whether any point has drifted."""
        return any(watch.reasons for watch in self._points.values())

    def points(self) -> dict[str, dict[str, Any]]:
        """``PointWatch.figures`` of each, by name."""
        return {name: watch.figures() for name, watch in sorted(self._points.items())}


def _but_for_load(compute: ComputePolicy) -> ComputePolicy:
    return dataclasses.replace(compute, load_aware=True)


def _tell(name: str, watch: PointWatch) -> None:
    found = watch.figures()
    if not watch.reasons:
        logger.warning("Operating point %s: traffic is again as it was measured on.", name)
        return
    wanted = found["expected"]["least_agreement"]
    logger.warning(
        "Operating point %s: traffic has drifted from what the point was measured on (%s): "
        "agreement %.4f, at least %s was promised; confidences differ by a stability index of %s. "
        "Run `fathom tune` again on a fresh trace.",
        name,
        " and ".join(watch.reasons),
        found["agreement"],
        "nothing" if wanted is None else f"{wanted:.4f}",
        "unknown" if found["psi"] is None else f"{found['psi']:.2f}",
    )
