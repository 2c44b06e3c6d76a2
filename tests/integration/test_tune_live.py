"""Finalists and live trials of ``fathom tune``, on a real Ray, with engines over a tiny model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fathom.tuning.operating_points import load
from tests.integration.test_tune import kill, runs, start
from tests.tiny_models import tiny_model
from tests.tuned import record

pytest.importorskip("optuna")

__all__ = ["tiny_model"]

BODY: dict[str, Any] = {
    "traces": ["t.parquet"],
    "objectives": ["quality", "budget"],
    "space": {"mode": "free", "exit_threshold": [0.002, 0.004, 0.006, 0.008]},
    "searcher": "grid",
    "live": {"prompts": ["p.jsonl"], "requests": 4, "new_tokens": 8},
    "finalists": 3,
}


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    record(tmp_path, tiny_model, prompts=10, new_tokens=12)
    return tmp_path


def write(folder: Path, **fields: Any) -> None:
    (folder / "small.yaml").write_text(yaml.safe_dump({**BODY, **fields}))


def verified(folder: Path) -> dict[str, tuple[int, str]]:
    """When each finalist's record was written, and what it says."""
    found = sorted((folder / "tune-small" / "live").glob("*.json"))
    return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in found}


@pytest.mark.slow
def test_killed_finalists_are_gone_on_with(folder: Path) -> None:
    write(folder)
    search = start(folder, "--parallel", "1")
    deadline = time.monotonic() + 180
    while not verified(folder):
        assert search.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.02)
    kill(search)
    before = verified(folder)
    assert 1 <= len(before) < 3
    # The points were written before anything ran live.
    points = load(folder / "tune-small" / "points.yaml")
    assert len(points.points) >= 3

    search = start(folder, "--json", "out.json")
    assert search.wait(timeout=240) == 0, (folder / "log").read_text()
    assert before.items() <= verified(folder).items()
    assert len(verified(folder)) == 3

    report = json.loads((folder / "out.json").read_text())
    rows = report["replay_error"]
    names = {row["point"] for row in rows}
    assert len(names) == 3
    assert len(rows) == 3 * 5
    points = load(folder / "tune-small" / "points.yaml")
    children = {run.info.run_name: run for run in runs(folder)}
    for row in rows:
        assert row["ci_low"] <= row["live"] <= row["ci_high"]
        run = children[f"live-{row['trial']:05d}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["fathom.point"] == row["point"]
        assert run.data.metrics[f"live.{row['figure']}"] == pytest.approx(row["live"])
        assert run.data.metrics[f"replay.{row['figure']}"] == pytest.approx(row["replay"])
        if row["figure"] == "quality":
            measured = points.points[row["point"]].measured
            assert measured["live_agreement"] == pytest.approx(row["live"], abs=1e-4)
            assert measured["live_requests"] == 4
    for name, point in points.points.items():
        assert ("live_agreement" in point.measured) == (name in names)


@pytest.mark.slow
def test_trials_run_the_engine(folder: Path) -> None:
    """Two exits, here the same one twice, and a batch limit that no replay could tell."""
    (folder / "u.parquet").write_bytes((folder / "t.parquet").read_bytes())
    exits = {"a": {"traces": ["t.parquet"]}, "b": {"traces": ["u.parquet"], "adapter": "none"}}
    write(
        folder,
        traces=[],
        exits=exits,
        evaluate="live",
        objectives=["quality", "throughput"],
        space={"mode": "free", "exit_threshold": 0.0, "max_num_seqs": 4},
        finalists=1,
    )
    search = start(folder, "--json", "out.json", "--mlflow", "none", "--parallel", "1")
    assert search.wait(timeout=300) == 0, (folder / "log").read_text()
    report = json.loads((folder / "out.json").read_text())
    assert report["trials"] == 2
    full = json.loads((folder / "tune-small" / "live" / "full.json").read_text())
    done = sorted((folder / "tune-small" / "trials").glob("*.done.json"))
    trials = [json.loads(path.read_text()) for path in done]
    assert {trial["setting"]["exit"] for trial in trials} == {"a", "b"}
    for trial in trials:
        assert trial["setting"]["max_num_seqs"] == 4
        assert trial["figures"]["full_tokens_per_s"] == full["tokens_per_s"]
        assert 0 < trial["figures"]["quality"] < 1
        assert trial["figures"]["exit_rate"] > 0.5
    # The points of an exit have a file of their own.
    for name in report["points_files"]:
        (exit_name,) = {row["setting"]["exit"] for row in report["front"]
                        if row["point"] in load(Path(name)).points}  # fmt: skip
        assert Path(name).name == f"points-{exit_name}.yaml"
    assert {row["figure"] for row in report["replay_error"]} >= {"quality", "exit_rate"}
