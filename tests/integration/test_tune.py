"""``fathom tune`` with a real Ray and a real MLflow on SQLite: killed, resumed, finished."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from fathom.tuning.operating_points import load
from tests.command_line import COMMAND, environment
from tests.traces import write_trace

pytest.importorskip("optuna")

TRIALS = 24


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    log = (folder / "log").open("a")
    return subprocess.Popen(
        [*COMMAND, "tune", "small.yaml", "--parallel", "2", *options],
        cwd=folder, env=environment(), stdout=log, stderr=log, text=True,
    )  # fmt: skip


def files(folder: Path, kind: str) -> dict[str, tuple[int, str]]:
    """When a file was written, and what it says, by name."""
    found = sorted((folder / "tune-small" / "trials").glob(f"*.{kind}.json"))
    return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in found}


def runs(folder: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'tune-small' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fathom-tune")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


@pytest.mark.slow
def test_a_killed_study_goes_on_without_losing_or_repeating_a_trial(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.parquet", requests=60, tokens=30, scale=4)
    body = {
        "traces": ["a.parquet"],
        "trials": TRIALS,
        "space": {
            "policy": ["threshold", "budget", "adaptive"],
            "confidence": ["softmax_gap", "max_prob"],
            "max_stack": {"low": 1, "high": 12},
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(body))
    chance = random.Random(time.time_ns())
    before: dict[str, tuple[int, str]] = {}
    begun: dict[str, tuple[int, str]] = {}
    for kill in range(2):
        search = start(tmp_path)
        # At some moment once trials are coming in.
        wanted = len(before) + chance.randint(2, 6)
        deadline = time.monotonic() + 180
        while len(files(tmp_path, "done")) < wanted:
            assert search.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(chance.random() * 0.3)
        os.kill(search.pid, signal.SIGKILL)
        search.wait()
        # Its workers end with it, maybe with a last trial.
        time.sleep(3)
        assert before.items() <= files(tmp_path, "done").items(), f"kill {kill}"
        assert begun.items() <= files(tmp_path, "begun").items(), f"kill {kill}"
        before, begun = files(tmp_path, "done"), files(tmp_path, "begun")
    assert len(before) < TRIALS
    search = start(tmp_path, "--json", "out.json")
    assert search.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    # What was done stays as it was; what was begun has its own setting still.
    done = files(tmp_path, "done")
    assert before.items() <= done.items()
    assert begun.items() <= files(tmp_path, "begun").items()
    assert list(done) == [f"{n:05d}.done.json" for n in range(TRIALS)]
    for name, (_, text) in files(tmp_path, "begun").items():
        trial = json.loads(done[name.replace("begun", "done")][1])
        assert trial["setting"] == json.loads(text)["setting"]
    assert len({json.dumps(json.loads(text)["setting"]) for _, text in done.values()}) > TRIALS / 2

    report = json.loads((tmp_path / "out.json").read_text())
    assert report["trials"] == TRIALS
    assert 0 < report["hypervolume"] < 1
    points = load(tmp_path / "tune-small" / "points.yaml")
    assert list(points.points) == [r["point"] for r in report["front"] if r["point"]]
    for name in points.points:
        points.resolve(name).validate()

    kept = runs(tmp_path)
    (parent,) = [run for run in kept if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in kept if run is not parent]
    assert parent.info.run_id == report["mlflow_run_id"]
    assert {run.info.status for run in kept} == {"FINISHED"}
    assert sorted(run.info.run_name for run in children) == [
        f"trial-{n:05d}" for n in range(TRIALS)
    ]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    for run in children:
        number = int(run.info.run_name.removeprefix("trial-"))
        trial = json.loads(done[f"{number:05d}.done.json"][1])
        assert run.data.params["policy"] == trial["setting"]["policy"]
        assert run.data.metrics["quality"] == pytest.approx(trial["figures"]["quality"])
    assert parent.data.tags["fathom.weights_digest"] == "weights-1"
    assert parent.data.metrics["hypervolume"] == pytest.approx(report["hypervolume"])
    folder = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert {p.name for p in folder.iterdir()} == {"small.yaml", "front.json", "points.yaml"}

    # Once more: nothing runs, and another study is not mixed in.
    again = start(tmp_path, "--json", "again.json")
    assert again.wait(timeout=120) == 0
    assert files(tmp_path, "done") == done
    assert len(runs(tmp_path)) == TRIALS + 1
    assert json.loads((tmp_path / "again.json").read_text())["front"] == report["front"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**body, "seed": 7}))
    assert start(tmp_path).wait(timeout=60) == 2
    assert "whose seed is 0, not 7" in " ".join((tmp_path / "log").read_text().split())
