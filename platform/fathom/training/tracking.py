"""Runs in MLflow: parameters once, curves in batches, files at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

EXPERIMENT = "fathom-train"
_BATCH = 500
"""Metrics sent at once: MLflow takes 1,000 a call, and a call over HTTP costs tens of ms."""


class Tracker:
    """One MLflow run, which an interrupted training or study goes on with.

    Args:
        uri: of the tracking server; empty takes SQLite in ``work_dir``.
        work_dir: remembers the run's id.
        experiment: that the run is in.
    """

    def __init__(
        self,
        work_dir: Path,
        *,
        name: str,
        params: Mapping[str, Any],
        uri: str,
        experiment: str = EXPERIMENT,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        import mlflow  # takes seconds

        work_dir.mkdir(parents=True, exist_ok=True)
        uri = uri or f"sqlite:///{(work_dir / 'mlflow.db').resolve()}"
        self._client = mlflow.MlflowClient(uri)
        self.uri = uri
        note = work_dir / "mlflow_run_id"
        if note.exists():
            self.run_id = note.read_text()
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(experiment)
            artifacts = (work_dir / "mlflow-artifacts").resolve().as_uri()
            experiment_id = found.experiment_id if found else self._client.create_experiment(
                experiment, artifact_location=artifacts if uri.startswith("sqlite") else None
            )  # fmt: skip
            run = self._client.create_run(experiment_id, run_name=name, tags=dict(tags or {}))
            self.run_id = run.info.run_id
            entities = mlflow.entities
            self._client.log_batch(
                self.run_id,
                params=[entities.Param(k, str(v)) for k, v in flatten(params).items()],
            )
            note.write_text(self.run_id)
        self._metric = mlflow.entities.Metric
        self._pending: list[Any] = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        status = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
        self._client.set_terminated(self.run_id, status)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Note figures of a step; they are sent in batches."""
        now = int(time.time() * 1000)
        self._pending += [self._metric(name, value, now, step) for name, value in figures.items()]
        if len(self._pending) >= _BATCH:
            self.flush()

    def has(self, metric: str) -> bool:
        """Whether the run holds a metric of that name."""
        return metric in self._client.get_run(self.run_id).data.metrics

    def children(self) -> dict[str, Any]:
        """The runs below this one, by name."""
        experiment = self._client.get_run(self.run_id).info.experiment_id
        found: dict[str, Any] = {}
        token: str | None = None
        while token is None or token:
            page = self._client.search_runs(
                [experiment],
                f"tags.`mlflow.parentRunId` = '{self.run_id}'",
                max_results=1000,
                page_token=token,
            )
            found |= {run.info.run_name: run for run in page}
            token = page.token or ""
        return found

    def add_child(
        self, name: str, params: Mapping[str, Any], figures: Mapping[str, float], known: Any = None
    ) -> None:
        """Note a finished run below this one, in one batch.

        Args:
            known: the run of that name, if an interrupted study had made it already.
        """
        from mlflow.entities import Metric, Param

        run = known
        if run is None:
            own = self._client.get_run(self.run_id).info
            run = self._client.create_run(
                own.experiment_id, run_name=name, tags={"mlflow.parentRunId": self.run_id}
            )
        if not run.data.metrics:
            now = int(time.time() * 1000)
            self._client.log_batch(
                run.info.run_id,
                params=[Param(key, str(value)) for key, value in params.items()],
                metrics=[Metric(key, value, now, 0) for key, value in figures.items()],
            )
        if run.info.status == "RUNNING":
            self._client.set_terminated(run.info.run_id)

    def keep_file(self, file: Path) -> None:
        """Keep a file as an artifact of the run."""
        self._client.log_artifact(self.run_id, str(file))

    def flush(self) -> None:
        """Send what is pending."""
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), 1000):
            self._client.log_batch(self.run_id, metrics=pending[start : start + 1000])


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
