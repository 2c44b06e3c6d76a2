"""One long MLflow run of a server: what its shadow finds, window by window."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from fathom.exits.drift import TOTALS

logger = logging.getLogger("fathom.shadow")

EXPERIMENT = "fathom-serve"
ALERT = "fathom.drift_alert"
"""Tag: the operating points that have drifted, or ``none``."""

_MOST_KEPT = 1440
"""Windows that wait for a tracking server that is away; a day of minutes. Older ones are lost."""

_WINDOWS_AT_ONCE = 20
_NO_NAME = re.compile(r"[^\w\-. /]")


class ServeRun:
    """Logs to a tracking server, which may be away at any time. Not thread-safe; calls may block.

    Args:
        uri: of the tracking server.
        server: names one life of a server: a process that takes over goes on with its run.
        tags: of the run. every_s: seconds of a window, which are a step.

    Attributes:
        run_id: None until the tracking server has answered. error: why it does not, or empty.
    """

    def __init__(self, uri: str, *, server: str, tags: Mapping[str, str], every_s: float) -> None:
        # MLflow's own patience is minutes; whoever calls tries again anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self.uri = uri
        self.run_id: str | None = None
        self.error = ""
        self._server = server
        self._tags = dict(tags)
        self._every_s = every_s
        self._client: Any = None
        self._started_ms = int(time.time() * 1000)
        self._totals: dict[str, dict[str, int]] = {}
        self._waiting: deque[tuple[int, dict[str, float]]] = deque(maxlen=_MOST_KEPT)
        self._alert = self._told_alert = "none"

    def log(self, points: Mapping[str, Mapping[str, Any]]) -> bool:
        """Note a window, and send whatever waits; returns whether everything has arrived.

        Args:
            points: ``ShadowWatch.points``.
        """
        figures = self._window(points)
        if figures:
            self._waiting.append((int(time.time() * 1000), figures))
        self._alert = ", ".join(n for n, point in points.items() if point["alert"]) or "none"
        try:
            self._send()
        except Exception as error:  # MLflow raises what it likes; serving must not care
            if not self.error:
                logger.warning(
                    "The tracking server at %s does not answer; what the shadow finds is kept for "
                    "it for %d windows: %s",
                    self.uri,
                    _MOST_KEPT,
                    error,
                )
            self.error = str(error).partition("\n")[0][:200] or type(error).__name__
            return False
        if self.error:
            logger.warning("The tracking server at %s answers again.", self.uri)
            self.error = ""
        return True

    def end(self) -> None:
        """Mark the run as finished, if the tracking server hears of it."""
        try:
            if self.run_id is not None:
                self._client.set_terminated(self.run_id)
        except Exception as error:
            logger.warning("The run of this server could not be ended: %s", error)

    def _window(self, points: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """Figures of what came since the last window, and the state of the alarms."""
        found: dict[str, float] = {}
        for name, point in points.items():
            now = {field: int(point[field]) for field in TOTALS}
            before = self._totals.get(name, {})
            if any(now[field] < before.get(field, 0) for field in TOTALS):
                before = {}  # the point means something else now, and is counted anew
            self._totals[name] = now
            new = {field: value - before.get(field, 0) for field, value in now.items()}
            prefix = _NO_NAME.sub("_", name)
            found[f"{prefix}/drift_alert"] = float(point["alert"])
            for test, evidence in point["evidence"].items():
                found[f"{prefix}/drift_evidence_{test}"] = evidence
            if not new["decided"]:
                continue
            if point["psi"] is not None:
                found[f"{prefix}/psi"] = point["psi"]
            found[f"{prefix}/completions"] = new["completions"]
            found[f"{prefix}/rows"] = new["asked"]
            found[f"{prefix}/agreement"] = 1 - new["wrong"] / new["decided"]
            found[f"{prefix}/exit_rate"] = new["exited"] / new["decided"]
            found[f"{prefix}/layers_per_token"] = new["layer_tokens"] / new["decided"]
            found[f"{prefix}/check_layers_per_token"] = new["check_layer_tokens"] / new["decided"]
        return found

    def _send(self) -> None:
        from mlflow.entities import Metric

        if self.run_id is None:
            self._open()
        while self._waiting:
            some = [self._waiting[i] for i in range(min(_WINDOWS_AT_ONCE, len(self._waiting)))]
            metrics = [
                Metric(name, value, at, int((at - self._started_ms) / (1000 * self._every_s)))
                for at, figures in some
                for name, value in figures.items()
            ]
            for start in range(0, len(metrics), 1000):  # MLflow takes so many a call
                self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
            for _ in some:
                self._waiting.popleft()
        if self._alert != self._told_alert:
            self._client.set_tag(self.run_id, ALERT, self._alert)
            self._told_alert = self._alert

    def _open(self) -> None:
        """Find this server's run, or make it."""
        import mlflow  # takes seconds

        client = mlflow.MlflowClient(self.uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
        found = client.search_runs([number], f"tags.`fathom.server` = '{self._server}'")
        if found:
            run = found[0]
        else:
            tags = {**self._tags, "fathom.server": self._server, ALERT: self._alert}
            name = f"serve-{self._server}"
            run = client.create_run(number, self._started_ms, tags, name)
            self._told_alert = self._alert
        self._client = client
        self._started_ms = run.info.start_time
        self.run_id = run.info.run_id
