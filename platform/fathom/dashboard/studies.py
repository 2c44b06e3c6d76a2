"""Studies as a tracking server has them, in the form that the dashboard shows.

MLflow is imported when the first study is asked for: it takes seconds, and few servers need it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fathom.settings import ConfigError
from fathom.tuning.study_runs import EXPERIMENT

MOST = 50
"""Studies that are listed, the latest."""

_FIGURES = ("quality", "budget", "tpot_ms", "exit_rate")


class Studies:
    """What a tracking server knows of studies. Blocking; to be called from a thread.

    Args:
        uri: of the tracking server.

    Attributes:
        page: address of MLflow's own pages; empty for a store without them.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.page = uri.rstrip("/") if urlsplit(uri).scheme in ("http", "https") else ""
        self._known: Any = None

    def listed(self) -> list[dict[str, Any]]:
        """The latest studies, newest first.

        Raises:
            ConfigError: if MLflow is not installed.
        """
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return []
        found = self._client.search_runs(
            [experiment.experiment_id],
            # Trials have no model of their own.
            "tags.`fathom.model` LIKE '%'",
            order_by=["attributes.start_time DESC"],
            max_results=MOST,
        )
        return [self._entry(run) for run in found]

    def study(self, run_id: str) -> dict[str, Any]:
        """One study: its entry, its front as ``fathom tune`` reports it, and every trial's figures.

        Raises:
            ConfigError: if MLflow is not installed.
            MlflowException: for a run that is not there.
        """
        run = self._client.get_run(run_id)
        front, digest = self._front(run_id)
        return {
            **self._entry(run),
            "front": front,
            "digest": digest,
            "trials": self._trials(run.info.experiment_id, run_id),
        }

    @property
    def _client(self) -> Any:
        if self._known is None:
            try:
                import mlflow
            except ModuleNotFoundError as error:
                raise ConfigError(
                    "studies need mlflow, which is not installed where the dashboard is served: "
                    "python -m pip install 'fathom-serve[train]'."
                ) from error
            self._known = mlflow.MlflowClient(self.uri)
        return self._known

    def _entry(self, run: Any) -> dict[str, Any]:
        info, tags = run.info, run.data.tags
        trials = run.data.metrics.get("trials")
        return {
            "run_id": info.run_id,
            "name": info.run_name,
            "begun": info.start_time,  # milliseconds since 1970
            "status": info.status,
            "trials": None if trials is None else int(trials),
            "hypervolume": run.data.metrics.get("hypervolume"),
            "model": tags.get("fathom.model", ""),
            "adapter": tags.get("fathom.adapter", ""),
            "url": f"{self.page}/#/experiments/{info.experiment_id}/runs/{info.run_id}",
        }

    def _front(self, run_id: str) -> tuple[list[dict[str, Any]], str | None]:
        """The front's rows, and the digest of its points; none before a study is done."""
        names = {each.path for each in self._client.list_artifacts(run_id)}
        with tempfile.TemporaryDirectory(prefix="fathom-dashboard-") as folder:

            def fetch(name: str) -> Path:
                return Path(self._client.download_artifacts(run_id, name, folder))

            rows: list[dict[str, Any]] = []
            if "front.json" in names:
                rows = json.loads(fetch("front.json").read_text())["front"]
            digest = None
            if "points.yaml" in names:
                digest = _digest(fetch("points.yaml"))
        return rows, digest

    def _trials(self, experiment_id: str, run_id: str) -> Sequence[dict[str, float]]:
        found: list[dict[str, float]] = []
        token: str | None = None
        while token is None or token:
            page = self._client.search_runs(
                [experiment_id],
                f"tags.`mlflow.parentRunId` = '{run_id}'",
                max_results=1000,
                page_token=token,
            )
            for trial in page:
                own = trial.data.metrics
                if all(name in own for name in _FIGURES):
                    found.append({name: own[name] for name in _FIGURES})
            token = page.token or ""
        return found


def _digest(file: Path) -> str:
    from fathom.tuning.operating_points import load

    return load(file).digest
