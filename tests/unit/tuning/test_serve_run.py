"""A server's run, in a real MLflow on SQLite, which comes and goes."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from fathom.exits.drift import Expected, PointWatch
from fathom.exits.shadow_watch import ShadowWatch
from fathom.tuning import serve_run
from fathom.tuning.serve_run import ALERT, EXPERIMENT, ServeRun
from tests.shadows import completion, expected_of

TAGS = {"fathom.application": "app"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def watch() -> ShadowWatch:
    rng = np.random.default_rng(0)
    made = ShadowWatch(0.05)
    made.expect({"p": expected_of(rng, loss=0.08, count=500)})
    return made


def feed(watch: ShadowWatch, count: int, seed: int, **changes: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    watch.take(completion(rng, **changes) for _ in range(count))
    return watch.points()


def open_run(uri: str, server: str, **options: Any) -> ServeRun:
    options.setdefault("every_s", 0.001)
    return ServeRun(uri, server=server, tags=TAGS, **options)


def test_windows_alarms_and_the_end(uri: str, watch: ShadowWatch) -> None:
    run = open_run(uri, "one")
    first = feed(watch, 50, 1)
    assert run.log(first)
    second = feed(watch, 150, 2, loss=0.5)
    assert second["p"]["alert"]
    assert run.log(second)
    assert run.log(second)  # nothing new
    client = mlflow.MlflowClient(uri)
    assert run.run_id is not None
    found = client.get_run(run.run_id)
    assert found.data.tags["fathom.application"] == "app"
    assert found.data.tags[ALERT] == "p"
    assert client.get_experiment(found.info.experiment_id).name == EXPERIMENT
    agreement = client.get_metric_history(run.run_id, "p/agreement")
    wrong = [first["p"]["wrong"], second["p"]["wrong"] - first["p"]["wrong"]]
    assert [m.value for m in agreement] == pytest.approx(
        [1 - wrong[0] / (50 * 20), 1 - wrong[1] / (150 * 20)]
    )
    assert 0 <= agreement[0].step < agreement[1].step
    assert [m.value for m in client.get_metric_history(run.run_id, "p/completions")] == [50, 150]
    assert [m.value for m in client.get_metric_history(run.run_id, "p/drift_alert")] == [0, 1, 1]
    assert found.data.metrics["p/layers_per_token"] == 12
    assert {"p/psi", "p/rows", "p/exit_rate", "p/drift_evidence_agreement"} <= set(
        found.data.metrics
    )
    assert run.log(feed(watch, 400, 3))
    assert client.get_run(run.run_id).data.tags[ALERT] == "none"
    run.end()
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_a_process_that_takes_over_goes_on_with_the_run(uri: str, watch: ShadowWatch) -> None:
    run = open_run(uri, "two")
    run.log(feed(watch, 10, 1))
    again, other = open_run(uri, "two"), open_run(uri, "three")
    points = feed(watch, 10, 2)
    assert again.log(points)
    assert other.log(points)
    assert again.run_id == run.run_id != other.run_id
    history = mlflow.MlflowClient(uri).get_metric_history(str(run.run_id), "p/completions")
    assert [m.value for m in history] == [10, 20]  # it knows no earlier window: all is new to it


def test_a_point_that_began_anew_is_counted_anew(uri: str, watch: ShadowWatch) -> None:
    run = open_run(uri, "four")
    run.log(feed(watch, 30, 1))
    watch.expect({"p": expected_of(np.random.default_rng(1), loss=0.2, count=200)})
    run.log(feed(watch, 10, 2))
    history = mlflow.MlflowClient(uri).get_metric_history(str(run.run_id), "p/completions")
    assert [m.value for m in history] == [30, 10]


def test_a_tracking_server_that_is_away_is_told_later(
    tmp_path: Path,
    watch: ShadowWatch,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_run, "_MOST_KEPT", 3)
    folder = tmp_path / "later"
    folder.touch()  # a file: no folder can be made there
    run = open_run(f"sqlite:///{folder / 'mlflow.db'}", "five")
    with caplog.at_level(logging.WARNING, logger="fathom.shadow"):
        for seed in range(5):
            assert not run.log(feed(watch, 10, seed))
        assert run.error
        assert run.run_id is None
        assert sum("does not answer" in record.message for record in caplog.records) == 1
        folder.unlink()
        time.sleep(0.01)  # MLflow takes a value of the same millisecond for the same one
        assert run.log(watch.points())
    assert run.error == ""
    assert "answers again" in caplog.records[-1].message
    client = mlflow.MlflowClient(run.uri)
    history = client.get_metric_history(str(run.run_id), "p/completions")
    # Of five windows and one without anything new, the latest three were kept.
    assert [m.value for m in history] == [10, 10]
    assert len(client.get_metric_history(str(run.run_id), "p/drift_alert")) == 3


def test_names_are_what_mlflow_takes(uri: str) -> None:
    point = PointWatch(Expected(), 0.05)
    point.observe(completion(np.random.default_rng(0)))
    run = open_run(uri, "six")
    assert run.log({'fast {"5%"}': point.figures()})
    found = mlflow.MlflowClient(uri).get_run(str(run.run_id))
    assert "fast __5___/agreement" in found.data.metrics
