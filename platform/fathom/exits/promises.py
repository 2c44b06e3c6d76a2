"""Promises of policy ``risk`` that are in use, each watched by what flushes and probes say."""

from __future__ import annotations

from typing import Any

from fathom.exits.risk import RiskMonitor
from fathom.types import ComputePolicy

_MOST = 16
"""Promises that are watched at once; another takes the place of the one with the fewest rows."""


class Promises:
    """Watches each promise by itself: a threshold of one measure, and the δ it was certified for.

    The unit is a completion, as it is of the certificate: rows of one resemble each other.
    """

    def __init__(self) -> None:
        self._monitors: dict[tuple[str, float, float], RiskMonitor] = {}

    def observe(self, measure: str, compute: ComputePolicy, loss: float) -> None:
        """Take one completion into account.

        Args:
            measure: name of the confidence. compute: with ``risk`` and its threshold.
            loss: share of its rows that left (or would have, but for a probe) and were wrong.
        """
        assert compute.risk is not None
        key = (measure, compute.risk, compute.threshold)
        monitor = self._monitors.get(key)
        if monitor is None:
            if len(self._monitors) >= _MOST:
                del self._monitors[min(self._monitors, key=lambda k: self._monitors[k].rows)]
            monitor = self._monitors[key] = RiskMonitor(compute.risk)
        monitor.observe(loss)

    def figures(self) -> dict[str, float]:
        """Alert, evidence and mean loss of each promise."""
        found: dict[str, float] = {}
        for (measure, delta, threshold), monitor in self._monitors.items():
            labels = f"{{confidence={measure},risk={delta:g},threshold={threshold:g}}}"
            found[f"risk_alert{labels}"] = float(monitor.alert)
            found[f"risk_evidence{labels}"] = monitor.evidence
            found[f"risk_observed{labels}"] = monitor.risk
        return found

    def snapshot(self) -> list[dict[str, Any]]:
        """The same as JSON can hold it."""
        return [
            {
                "confidence": measure,
                "risk": delta,
                "threshold": threshold,
                "completions": monitor.rows,
                "observed": monitor.risk,
                "evidence": monitor.evidence,
                "alert": monitor.alert,
            }
            for (measure, delta, threshold), monitor in self._monitors.items()
        ]
