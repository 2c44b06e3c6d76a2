"""``fathom tune`` with a real Ray and a real MLflow on SQLite: killed, resumed, finished."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml

from fathom.tuning.operating_points import load
from tests.command_line import COMMAND, environment
from tests.traces import write_trace

pytest.importorskip("optuna")

pytestmark = pytest.mark.parallel

TRIALS = 16
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a search; one that is still there when its test has failed goes with its Ray."""
    started: list[subprocess.Popen[str]] = []

    def begin(*options: str) -> subprocess.Popen[str]:
        log = (tmp_path / "log").open("a")
        search = subprocess.Popen(
            [*COMMAND, "tune", "small.yaml", "--parallel", "2", *options],
            cwd=tmp_path, env=environment(), stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(search)
        return search

    yield begin
    for search in started:
        if search.poll() is None:
            kill(search)


def kill(search: subprocess.Popen[str]) -> None:
    """SIGKILL to the search's whole process group at once; what Ray has elsewhere ends after it."""
    try:
        family = psutil.Process(search.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    os.killpg(search.pid, signal.SIGKILL)
    search.wait()
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left, f"still running: {left}"


def files(folder: Path, kind: str) -> dict[str, tuple[int, str]]:
    """When a file was written, and what it says, by name."""
    found = sorted((folder / "tune-small" / "trials").glob(f"*.{kind}.json"))
    return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in found}


def runs(folder: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'tune-small' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fathom-tune")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def wait_for(folder: Path, search: subprocess.Popen[str], count: int, *kinds: str) -> None:
    """Until there are so many files of these kinds, or the search has ended well."""
    deadline = time.monotonic() + 180
    while sum(len(files(folder, kind)) for kind in kinds) < count:
        if search.poll() == 0:
            return
        assert search.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_study_goes_on_without_losing_or_repeating_a_trial(
    tmp_path: Path, start: Start
) -> None:
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
    search = start()
    wait_for(tmp_path, search, random.Random(time.time_ns()).randint(2, TRIALS // 2), "done")
    kill(search)
    before, begun = files(tmp_path, "done"), files(tmp_path, "begun")
    assert 0 < len(before) < TRIALS
    search = start("--json", "out.json")
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
    assert {p.name for p in folder.iterdir()} == {
        "small.yaml", "front.json", "points.yaml", "figures",
    }  # fmt: skip
    drawn = {p.name for p in (folder / "figures").iterdir()}
    assert {"pareto_front.png", "exit_depth.png", "parallel_coordinates.png"} <= drawn
    assert drawn == {Path(path).name for path in report["figures"]}

    # Once more: nothing runs, and another study is not mixed in.
    again = start("--json", "again.json")
    assert again.wait(timeout=120) == 0
    assert files(tmp_path, "done") == done
    assert len(runs(tmp_path)) == TRIALS + 1
    assert json.loads((tmp_path / "again.json").read_text())["front"] == report["front"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**body, "seed": 7}))
    assert start().wait(timeout=60) == 2
    assert "whose seed is 0, not 7" in " ".join((tmp_path / "log").read_text().split())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_asha_killed_at_random_loses_and_repeats_nothing(tmp_path: Path, start: Start) -> None:
    write_trace(tmp_path / "a.parquet", requests=120, tokens=30, scale=4)
    body = {
        "traces": ["a.parquet"],
        "objectives": ["tpot"],
        "constraints": {"max_quality_loss": 0.2},
        "scheduler": "asha",
        "asha": {"first_rows": 150, "reduction_factor": 3},
        "trials": TRIALS,
        "space": {
            "policy": ["threshold", "budget", "adaptive"],
            "confidence": ["softmax_gap", "max_prob"],
            "max_stack": {"low": 1, "high": 12},
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(body))
    seed = time.time_ns()
    chance = random.Random(seed)
    kinds = ("begun", "rung-*", "done")
    known: dict[str, tuple[int, str]] = {}

    def check() -> None:
        """What was written before stays as it was, to the nanosecond: nothing ran again."""
        now = {name: each for kind in kinds for name, each in files(tmp_path, kind).items()}
        changed = [name for name, each in known.items() if now.get(name) != each]
        assert not changed, f"seed {seed}: {changed}"
        known.update(now)

    search = start()
    time.sleep(chance.uniform(0, 6))  # at its start, maybe while it makes MLflow's tables
    kill(search)
    check()
    search = start()
    wait_for(tmp_path, search, len(known) + chance.randint(1, TRIALS), *kinds)
    time.sleep(chance.uniform(0, 0.5))
    kill(search)
    check()
    search = start("--json", "out.json")
    assert search.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    check()

    names = [f"{n:05d}" for n in range(TRIALS)]
    done = {name[:5]: json.loads(text) for name, (_, text) in files(tmp_path, "done").items()}
    begun = {name[:5]: json.loads(text) for name, (_, text) in files(tmp_path, "begun").items()}
    assert list(done) == list(begun) == names
    assert all(done[name]["setting"] == begun[name]["setting"] for name in names)
    # 1,800 rows are replayed on: rungs of 200, 600 and all of them.
    stopped = {name: trial["rung"] for name, trial in done.items() if trial["rung"] is not None}
    assert 0 < len(stopped) < TRIALS
    for name in names:
        last = stopped.get(name, 1)
        rungs = [each for each in files(tmp_path, "rung-*") if each.startswith(name)]
        assert rungs == [f"{name}.rung-{rung}.json" for rung in range(last + 1)]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["trials"] == TRIALS
    assert all(f"{row['trial']:05d}" not in stopped for row in report["front"])

    (parent,) = [run for run in runs(tmp_path) if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs(tmp_path) if run.info != parent.info}
    assert len(runs(tmp_path)) == TRIALS + 1
    assert sorted(children) == [f"trial-{name}" for name in names]
    for name, run in children.items():
        trial = done[name.removeprefix("trial-")]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["tpot_ms"] == pytest.approx(trial["figures"]["tpot_ms"])
        known_rung = None if trial["rung"] is None else str(trial["rung"])
        assert run.data.tags.get("fathom.stopped_at_rung") == known_rung
