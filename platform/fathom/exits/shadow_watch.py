"""What the shadow of all replicas says, by operating point."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fathom.exits.drift import Expected, PointWatch
from fathom.exits.shadow import Shadowed

logger = logging.getLogger("fathom.shadow")

DEFAULT = "default"
"""Name under which requests are watched that go by no operating point."""

_MOST = 64
"""Points that are watched at once; another takes the place of the one with the fewest rows."""


class ShadowWatch:
    """Watches every operating point. Not thread-safe.

    Args:
        alpha: rate of false alarms of each point; see ``PointWatch``.

    Attributes:
        completions: taken in so far.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._expected: dict[str, Expected] = {}
        self._points: dict[str, PointWatch] = {}
        self.completions = 0

    def expect(self, expected: Mapping[str, Expected]) -> None:
        """Take what points were measured on; one that means something else now begins anew."""
        changed = {
            name
            for name in self._expected.keys() | expected.keys()
            if self._expected.get(name) != expected.get(name)
        }
        for name in changed:
            self._points.pop(name, None)
        self._expected = dict(expected)

    def take(self, completions: Iterable[Shadowed]) -> None:
        """Take in completions that have ended; tell the log of alarms."""
        for each in completions:
            self.completions += 1
            name = each.point or DEFAULT
            watch = self._points.get(name) or self._begin(name)
            if watch.observe(each):
                _tell(name, watch)

    def _begin(self, name: str) -> PointWatch:
        if len(self._points) >= _MOST:
            del self._points[min(self._points, key=lambda each: self._points[each].rows)]
        watch = PointWatch(self._expected.get(name, Expected()), self._alpha)
        self._points[name] = watch
        return watch

    @property
    def alert(self) -> bool:
        """Whether any point has drifted."""
        return any(watch.reasons for watch in self._points.values())

    def points(self) -> dict[str, dict[str, Any]]:
        """``PointWatch.figures`` of each, by name."""
        return {name: watch.figures() for name, watch in sorted(self._points.items())}


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


def metric_figures(points: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Figures under the names of the metrics, labelled by operating point."""
    told: dict[str, float] = {}
    for name, point in points.items():
        labels = f"{{operating_point={name}}}"
        told[f"drift_alert{labels}"] = float(point["alert"])
        told[f"drift_alarms{labels}"] = point["alarms"]
        for test, evidence in point["evidence"].items():
            told[f"drift_evidence{{operating_point={name},test={test}}}"] = evidence
        for key in ("agreement", "exit_rate", "layers_per_token", "psi"):
            if point[key] is not None:
                told[f"shadow_{key}{labels}"] = point[key]
        if point["expected"]["least_agreement"] is not None:
            told[f"shadow_least_agreement{labels}"] = point["expected"]["least_agreement"]
        for key in ("completions", "rows", "layer_tokens", "check_layer_tokens"):
            told[f"shadow_{key}{labels}"] = point[key]
    return told
