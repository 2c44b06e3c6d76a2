"""``fathom tune`` with ``evaluate: served``: an application a trial, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve

from fathom.cli import main
from fathom.commands.tune_live import LiveRuns
from fathom.tuning.live_setting import InProcess
from fathom.tuning.operating_points import load
from fathom.tuning.runner import as_figures
from fathom.tuning.study import load_study
from fathom.tuning.study_traces import read_traces
from tests.command_line import COMMAND, environment
from tests.ray_fixtures import TestServer
from tests.tiny_models import tiny_model
from tests.tuned import record

pytest.importorskip("optuna")

__all__ = ["tiny_model"]

RATIOS = ["1:1", "2:1"]
STUDY = {
    "traces": ["t.parquet"],
    "evaluate": "served",
    "objectives": ["throughput", "quality"],
    # Most tokens leave, and some of them are wrong.
    "space": {
        "mode": "free", "exit_threshold": 0.002, "pause_drafting": False, "max_num_seqs": 4,
        "flush_rule": "eager", "replica_ratio": RATIOS,
    },
    "searcher": "grid",
    "live": {"prompts": ["p.jsonl"], "requests": 4, "new_tokens": 8, "cpus": 0.9},
    "finalists": 1,
}  # fmt: skip


def ours() -> list[str]:
    """Applications of studies that are up, or on their way."""
    return [name for name in serve.status().applications if name.startswith("fathom-tune-")]


def done(folder: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """When each trial's figures were written, and what they are."""
    files = sorted((folder / "tune-small" / "trials").glob("*.done.json"))
    return {path.name: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in files}


def killed_in_the_second_trial(folder: Path) -> None:
    """The search in a process of its own on this Ray, which then has an application without one."""
    address = ray.get_runtime_context().gcs_address
    log = (folder / "log").open("w")
    search = subprocess.Popen(
        [*COMMAND, "tune", "small.yaml", "--parallel", "1", "--mlflow", "none"],
        cwd=folder, env={**environment(), "RAY_ADDRESS": address},
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (len(done(folder)) == 1 and ours()):
            said = (folder / "log").read_text()
            assert search.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)
    finally:
        os.killpg(search.pid, signal.SIGKILL)
        search.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_over_replica_ratios_goes_on_after_a_kill(
    tmp_path: Path, tiny_model: Path, server: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, tiny_model, prompts=10, new_tokens=12)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(STUDY))
    killed_in_the_second_trial(tmp_path)
    assert ours()
    before = done(tmp_path)

    monkeypatch.chdir(tmp_path)
    command = ["tune", "small.yaml", "--parallel", "1", "--mlflow", "none", "--json", "out.json"]
    assert main(command) == 0
    after = done(tmp_path)
    assert before.items() <= after.items()
    trials = [trial for _, trial in after.values()]
    assert [trial["setting"]["replica_ratio"] for trial in trials] == RATIOS

    # Neither the replicas nor the way there show in tokens, nor in where they were decided.
    study = load_study(tmp_path / "small.yaml")
    runs = LiveRuns(study, tmp_path, read_traces(study, tmp_path), tmp_path)
    parts = runs.parts
    own = as_figures(InProcess(study).run(trials[0]["setting"], parts, beside_full=False))
    assert 0 < own.quality < 1
    full = json.loads((tmp_path / "tune-small" / "live" / "full.json").read_text())
    for figures in (trial["figures"] for trial in trials):
        for name in ("quality", "exit_rate", "budget"):
            assert figures[name] == pytest.approx(getattr(own, name))
        assert figures["full_tokens_per_s"] == full["tokens_per_s"] > 0
        # Through HTTP and two more processes nothing is faster than in one.
        assert 0 < figures["tokens_per_s"] < own.tokens_per_s
        assert figures["tpot_ms"] > own.tpot_ms > 0

    # Nothing is left, and the server that was there before answers.
    assert not ours()
    with server.http() as http:
        assert http.get("/ready").status_code == 200

    report = json.loads((tmp_path / "out.json").read_text())
    (row,) = [row for row in report["front"] if row["point"] == "front-1"]
    point = load(tmp_path / "tune-small" / "points.yaml").points["front-1"]
    assert f'"replica_ratio": "{row["setting"]["replica_ratio"]}"' in point.note
    assert "fathom serve --shallow-replicas" in point.note
    assert point.measured["served_tokens_per_s"] == pytest.approx(row["tokens_per_s"], abs=1e-4)
    assert point.measured["live_tokens_per_s"] > 0  # of the finalist, on held-out requests
    assert {each["figure"] for each in report["replay_error"]} >= {"quality", "exit_rate"}


def test_more_cores_than_there_are_is_told(
    tmp_path: Path,
    tiny_model: Path,
    server: TestServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record(tmp_path, tiny_model, prompts=6, new_tokens=4)
    body = {**STUDY, "live": {**STUDY["live"], "cpus": 64, "requests": 2}}  # type: ignore[dict-item]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(body))
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "small.yaml", "--mlflow", "none"]) == 2
    assert "live.cpus 64 and 0.1 for HTTP are more than" in " ".join(
        capsys.readouterr().err.split()
    )
