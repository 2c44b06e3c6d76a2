"""Training runs in MLflow: parameters once, curves in batches, the adapter's card at the end."""

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
    """One MLflow run, which an interrupted training goes on with.

    Args:
        uri: of the tracking server; empty takes SQLite in ``work_dir``.
        work_dir: remembers the run's id.
    """

    def __init__(self, work_dir: Path, *, name: str, params: Mapping[str, Any], uri: str) -> None:
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
            found = self._client.get_experiment_by_name(EXPERIMENT)
            artifacts = (work_dir / "mlflow-artifacts").resolve().as_uri()
            experiment = found.experiment_id if found else self._client.create_experiment(
                EXPERIMENT, artifact_location=artifacts if uri.startswith("sqlite") else None
            )  # fmt: skip
            self.run_id = self._client.create_run(experiment, run_name=name).info.run_id
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
