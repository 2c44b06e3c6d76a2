"""Runs in MLflow: parameters once, curves in batches, files at the end."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

EXPERIMENT = "fathom-train"
_BATCH = 500
"""Metrics sent at once: MLflow takes 1,000 a call, and a call over HTTP costs tens of ms."""
_KEY = "fathom.work_folder"
"""Tag by which a work folder's run is found again."""


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
        if not uri:
            database = (work_dir / "mlflow.db").resolve()
            _make_whole(database)
            uri = f"sqlite:///{database}"
        # Of a server, MLflow prints two lines a run, which would cut up the progress bars.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self._client = mlflow.MlflowClient(uri)
        self.uri = uri
        note = work_dir / "mlflow_run_id"
        if note.exists():
            self.run_id = note.read_text()
            run = self._client.get_run(self.run_id)
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            run = self._own_run(work_dir, experiment, name, dict(tags or {}))
            self.run_id = run.info.run_id
            _write(note, self.run_id)
        self._experiment = run.info.experiment_id
        if not run.data.params:
            param = mlflow.entities.Param
            self._client.log_batch(
                self.run_id, params=[param(k, str(v)) for k, v in flatten(params).items()]
            )
        self._metric = mlflow.entities.Metric
        self._pending: list[Any] = []

    def _own_run(self, work_dir: Path, experiment: str, name: str, tags: dict[str, str]) -> Any:
        """The run of this folder, which a killed process may have made and not noted."""
        note = work_dir / "mlflow_run_key"
        if not note.exists():
            _write(note, uuid.uuid4().hex)
        key = note.read_text()
        found = self._client.get_experiment_by_name(experiment)
        if found:
            known = self._client.search_runs([found.experiment_id], f"tags.`{_KEY}` = '{key}'")
            if known:
                return known[0]
            experiment_id = found.experiment_id
        else:
            artifacts = (work_dir / "mlflow-artifacts").resolve().as_uri()
            experiment_id = self._client.create_experiment(
                experiment, artifact_location=artifacts if self.uri.startswith("sqlite") else None
            )
        return self._client.create_run(experiment_id, run_name=name, tags={**tags, _KEY: key})

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

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._client.set_tag(self.run_id, name, value)

    def has(self, metric: str) -> bool:
        """Whether the run holds a metric of that name."""
        return metric in self._client.get_run(self.run_id).data.metrics

    def steps(self, metric: str) -> set[int]:
        """Steps at which the run holds a metric of that name."""
        return {each.step for each in self._client.get_metric_history(self.run_id, metric)}

    def children(self) -> dict[str, Any]:
        """The runs below this one, by name."""
        found: dict[str, Any] = {}
        token: str | None = None
        while token is None or token:
            page = self._client.search_runs(
                [self._experiment],
                f"tags.`mlflow.parentRunId` = '{self.run_id}'",
                max_results=1000,
                page_token=token,
            )
            found |= {run.info.run_name: run for run in page}
            token = page.token or ""
        return found

    def add_child(
        self,
        name: str,
        params: Mapping[str, Any],
        figures: Mapping[str, float],
        known: Any = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Note a finished run below this one, in one batch.

        Args:
            known: the run of that name, if an interrupted study had made it already.
        """
        from mlflow.entities import Metric, Param

        run = known
        if run is None:
            own = {"mlflow.parentRunId": self.run_id, **(tags or {})}
            run = self._client.create_run(self._experiment, run_name=name, tags=own)
        if not run.data.metrics:
            now = int(time.time() * 1000)
            self._client.log_batch(
                run.info.run_id,
                params=[Param(key, str(value)) for key, value in params.items()],
                metrics=[Metric(key, value, now, 0) for key, value in figures.items()],
            )
        if run.info.status == "RUNNING":
            self._client.set_terminated(run.info.run_id)

    def add_datasets(self, datasets: Sequence[Any], context: str) -> None:
        """Note what the run has worked on; what is there already stays as it is.

        Args:
            datasets: of ``mlflow.entities.Dataset``. context: what for, as MLflow's UI shows it.
        """
        from mlflow.entities import DatasetInput, InputTag

        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self.run_id, [DatasetInput(each, [tag]) for each in datasets])

    def keep_file(self, file: Path, folder: str | None = None) -> None:
        """Keep a file as an artifact of the run, in a folder of its artifacts."""
        self._client.log_artifact(self.run_id, str(file), folder)

    def flush(self) -> None:
        """Send what is pending."""
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), 1000):
            self._client.log_batch(self.run_id, metrics=pending[start : start + 1000])


def _make_whole(database: Path) -> None:
    """Make MLflow's tables, all or none: a database half made by a killed process is no use."""
    import mlflow

    if database.exists():
        return
    partial = database.with_name(f"{database.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{partial}").search_experiments(max_results=1)
    partial.replace(database)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
