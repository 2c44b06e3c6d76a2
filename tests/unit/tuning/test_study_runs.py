"""A study's runs in a real MLflow on SQLite: what they say, and what a kill may leave behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest

from fathom.training.tracking import Tracker
from fathom.tuning.ledger import Trial
from fathom.tuning.objective import Figures
from fathom.tuning.study import Constraints, Study
from fathom.tuning.study_runs import StudyRuns, _git
from fathom.tuning.study_traces import Traces, read_traces
from tests.traces import write_trace

STUDY = Study(name="s", traces=("a.parquet",), constraints=Constraints(max_quality_loss=0.1))
SETTING = {"mode": "free", "policy": "threshold", "exit_threshold": 0.5}


def figures(quality: float) -> Figures:
    return Figures(quality, budget=0.5, tpot_ms=4.0, full_tpot_ms=8.0, exit_rate=0.6)


TRIALS = [
    Trial(0, SETTING, figures(0.95), 0.25),
    Trial(1, {**SETTING, "exit_threshold": 0.1}, figures(0.6), 0.125, rung=1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    write_trace(path / "a.parquet", requests=20, tokens=10)
    (path / "s.yaml").write_text("traces: [a.parquet]\n")
    (path / "figure.png").write_bytes(b"png")
    return path


@pytest.fixture(scope="module")
def traces(folder: Path) -> Traces:
    return read_traces(STUDY, folder)


def begin(folder: Path, traces: Traces) -> StudyRuns:
    return StudyRuns(STUDY, folder / "s.yaml", traces, folder / "work", "")


def runs(folder: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'work' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fathom-tune")
    return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture(scope="module")
def kept(folder: Path, traces: Traces) -> list[Any]:
    """Runs of a study that was killed twice: before its run was noted, and between two trials."""
    begin(folder, traces)
    (folder / "work" / "mlflow_run_id").unlink()
    with begin(folder, traces) as first:
        first.add(TRIALS[:1])
    with begin(folder, traces) as again:
        again.add(TRIALS)
        again.finish(TRIALS, [], [folder / "figure.png"])
    return runs(folder)


def test_a_killed_study_has_its_runs_once(kept: list[Any], folder: Path) -> None:
    names = sorted(run.info.run_name for run in kept)
    assert names == ["s", "trial-00000", "trial-00001"]
    assert {run.info.status for run in kept} == {"FINISHED"}
    (parent,) = [run for run in kept if run.info.run_name == "s"]
    assert (folder / "work" / "mlflow_run_id").read_text() == parent.info.run_id
    assert not list((folder / "work").glob("*.partial"))


def test_the_parent_says_what_was_searched_on_which_data(kept: list[Any], traces: Traces) -> None:
    (parent,) = [run for run in kept if run.info.run_name == "s"]
    params, tags = parent.data.params, parent.data.tags
    assert params["objectives"] == "quality, budget, tpot"
    assert params["constraints.max_quality_loss"] == "0.1"
    assert "constraints.max_tpot_ms" not in params
    assert params["space.exit_threshold.low"] == "0.05"
    assert tags["fathom.weights_digest"] == "weights-1"
    assert tags["fathom.adapter_digest"] == "adapter-1"
    assert tags["fathom.trace.a.parquet"] == traces.digests[0]
    assert parent.data.metrics["trials"] == 2
    assert parent.data.metrics["trials_stopped"] == 1
    assert parent.data.metrics["front_size"] == 1
    (used,) = parent.inputs.dataset_inputs
    assert used.tags[0].value == "tuning"
    assert used.dataset.name == "a.parquet"
    assert traces.digests[0].startswith(used.dataset.digest) and len(used.dataset.digest) == 36
    profile = json.loads(used.dataset.profile)
    assert profile["num_rows"] == 200 and profile["sha256"] == traces.digests[0]
    assert profile["replayed_requests"] == profile["held_out_requests"] == 10
    assert json.loads(used.dataset.source)["uri"] == str(traces.paths[0].resolve())
    artifacts = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert {p.name for p in artifacts.iterdir()} == {"s.yaml", "figures"}
    assert [p.name for p in (artifacts / "figures").iterdir()] == ["figure.png"]


def test_a_child_says_where_it_was_stopped(kept: list[Any]) -> None:
    children = {run.info.run_name: run.data for run in kept}
    whole, stopped = children["trial-00000"], children["trial-00001"]
    assert "fathom.stopped_at_rung" not in whole.tags
    assert stopped.tags["fathom.stopped_at_rung"] == "1"
    assert stopped.params == {"mode": "free", "policy": "threshold", "exit_threshold": "0.1"}
    assert stopped.metrics["violation.max_quality_loss"] == pytest.approx(0.3)
    assert (whole.metrics["quality"], whole.metrics["seconds"]) == (0.95, 0.25)


def test_a_curve_that_was_cut_off_is_made_whole(
    folder: Path, traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long study sends its curve in several batches."""
    monkeypatch.setattr("fathom.training.tracking._BATCH", 2)
    uri = f"sqlite:///{folder / 'work' / 'mlflow.db'}"
    trials = [Trial(n, SETTING, figures(0.95), 0.25) for n in range(5)]
    many = Study(name="many", traces=("a.parquet",), trials=5)

    def runs() -> StudyRuns:
        return StudyRuns(many, folder / "s.yaml", traces, tmp_path, uri)

    killed = runs()
    sent: list[int] = []
    log = Tracker.log

    def until_a_kill(tracker: Tracker, step: int, values: Mapping[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt
        sent.append(step)
        log(tracker, step, values)

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "log", until_a_kill)
        with pytest.raises(KeyboardInterrupt):
            killed.finish(trials, [], [])
    assert sent == [1, 2, 3]  # of which the third waits for its batch, and is lost
    for _ in range(2):
        with runs() as again:
            again.finish(trials, [], [])
    client = mlflow.MlflowClient(uri)
    history = client.get_metric_history(again.run_id, "hypervolume")
    assert sorted(each.step for each in history) == [1, 2, 3, 4, 5]
    assert client.get_run(again.run_id).data.metrics["trials"] == 5
    assert len(client.get_metric_history(again.run_id, "trials")) == 1


def test_a_run_killed_before_its_parameters_gets_them(tmp_path: Path, folder: Path) -> None:
    uri = f"sqlite:///{folder / 'work' / 'mlflow.db'}"  # which has its tables already
    Tracker(tmp_path, name="t", params={}, uri=uri)
    with Tracker(tmp_path, name="t", params={"a": {"b": 1}}, uri=uri) as again:
        pass
    assert mlflow.MlflowClient(uri).get_run(again.run_id).data.params == {"a.b": "1"}


def test_git_is_told_where_it_knows_the_file(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *words]
        subprocess.run(command, check=True, capture_output=True)

    file = tmp_path / "s.yaml"
    file.write_text("a")
    assert _git("x", file) == {}
    git("init")
    assert _git("x", file) == {}
    git("add", ".")
    git("commit", "-m", "m")
    clean = _git("x", file)
    assert len(clean["x.commit"]) == 40 and clean["x.dirty"] == "false"
    file.write_text("b")
    assert _git("x", file) == {**clean, "x.dirty": "true"}


def test_a_baseline_is_noted_once_it_is_there(folder: Path, traces: Traces, tmp_path: Path) -> None:
    def begun() -> StudyRuns:
        return StudyRuns(STUDY, folder / "s.yaml", traces, tmp_path / "work", "")

    figures: dict[str, Any] = {"name": "vLLM, full depth", "tpot_ms": 8.5, "tokens_per_s": 90.0}
    with begun() as first:
        first.add_baseline({"name": figures["name"], "missing": "no vLLM"})
    (run,) = runs(tmp_path)
    assert run.data.tags["fathom.baseline"] == "missing: no vLLM"
    assert not run.data.metrics
    for _ in range(2):
        with begun() as again:
            again.add_baseline(figures)
    (run,) = runs(tmp_path)
    assert run.data.tags["fathom.baseline"] == figures["name"]
    assert run.data.metrics == {"baseline_tpot_ms": 8.5, "baseline_tokens_per_s": 90.0}
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}")
    assert len(client.get_metric_history(run.info.run_id, "baseline_tpot_ms")) == 1
