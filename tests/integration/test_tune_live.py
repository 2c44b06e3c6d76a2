"""``fathom tune`` with the engine on a real Ray: live trials, finalists, and going on with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from fathom.cli import main
from fathom.tuning.operating_points import load
from tests.ray_fixtures import TestServer
from tests.tiny_models import tiny_model
from tests.tuned import record

pytest.importorskip("optuna")

__all__ = ["tiny_model"]


def tune(folder: Path, finalists: int) -> dict[str, Any]:
    """Run the study, or go on with it; returns its report."""
    body = {
        "exits": {"early": {"traces": ["t.parquet"], "adapter": "none"}},
        "evaluate": "live",
        "objectives": ["quality", "budget"],
        # All tokens leave, or about half of them: neither dominates the other.
        "space": {
            "mode": "free",
            "exit_threshold": [0.0, 0.004],
            "max_num_seqs": 4,
            "flush_rule": "eager",
        },
        "searcher": "grid",
        "live": {"prompts": ["p.jsonl"], "requests": 4, "new_tokens": 8},
        "finalists": finalists,
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(body))
    options = ["--work-dir", str(folder / "work"), "--json", str(folder / "out.json")]
    assert main(["tune", str(folder / "small.yaml"), "--parallel", "1", *options]) == 0
    report: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return report


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """When each file was written, and what it says."""
    return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in folder.iterdir()}


@pytest.mark.slow
def test_trials_and_finalists_run_the_engine_once(
    tmp_path: Path, tiny_model: Path, server: TestServer
) -> None:
    record(tmp_path, tiny_model, prompts=10, new_tokens=12)
    report = tune(tmp_path, finalists=1)
    assert report["trials"] == 2
    trials, live = files(tmp_path / "work" / "trials"), files(tmp_path / "work" / "live")
    assert len(live) == 2  # mode full, which trials are held against, and a finalist
    full = json.loads(live["full.json"][1])
    for row in report["front"]:
        assert row["setting"]["max_num_seqs"] == 4
        assert row["setting"]["flush_rule"] == "eager"
        assert row["full_tokens_per_s"] == full["tokens_per_s"]
        assert (
            (row["exit_rate"] == 1)
            == (row["quality"] < 1)
            == (not row["setting"]["exit_threshold"])
        )

    report = tune(tmp_path, finalists=2)
    assert files(tmp_path / "work" / "trials") == trials
    after = files(tmp_path / "work" / "live")
    assert live.items() <= after.items()
    assert len(after) == 3

    rows = report["replay_error"]
    assert [row["figure"] for row in rows] == 2 * [
        "exit_rate", "quality", "budget", "tpot_ms", "speedup",
    ]  # fmt: skip
    assert report["points_files"] == [str(tmp_path / "work" / "points-early.yaml")]
    points = load(Path(report["points_files"][0])).points
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fathom-tune")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert all('"flush_rule": "eager"' in point.note for point in points.values())
    for row in rows:
        assert row["ci_low"] <= row["live"] <= row["ci_high"]
        run = runs[f"live-{row['trial']:05d}"]
        assert run.info.status == "FINISHED"
        assert run.data.metrics[f"live.{row['figure']}"] == pytest.approx(row["live"])
        assert run.data.metrics[f"replay.{row['figure']}"] == pytest.approx(row["replay"])
        if row["figure"] == "quality":
            measured = points[row["point"]].measured
            assert measured["live_agreement"] == pytest.approx(row["live"], abs=1e-4)
            assert measured["live_requests"] == 4
