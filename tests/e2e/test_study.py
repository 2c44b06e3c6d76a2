"""`make study` on a tiny model: from nothing to a server that runs at what was promoted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from fathom.tuning.operating_points import load
from tests.command_line import environment

pytest.importorskip("optuna")

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).parents[2]
TRIALS = 20


def run(work: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.study.run", "--work", work, *map(str, options)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_study_ends_with_a_server_at_its_point(tiny_model: Path, tmp_path: Path) -> None:
    body = yaml.safe_load((ROOT / "experiments" / "study" / "study.yaml").read_text())
    # Finalists live have tests of their own.
    body |= {"trials": TRIALS, "finalists": 0, "live": {}}
    study = tmp_path / "small.yaml"
    study.write_text(yaml.safe_dump(body))
    work = tmp_path / "work"
    options: tuple[Any, ...] = (
        "--study", study, "--prompts", 12, "--new-tokens", 16, "--model", tiny_model,
        "--adapter", "none", "--exit-layer", 2, "--dtype", "float32", "--kv-cache-bytes", 4 << 20,
    )  # fmt: skip
    # What an interrupted recording leaves.
    work.mkdir()
    (work / "answers.jsonl.partial").write_text("{}\n")
    result = run(work, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    promoted = json.loads((work / "promoted.json").read_text())
    points = load(work / "study" / "points.yaml")
    assert promoted["point"] in points.points
    assert promoted["measured"]["agreement"] >= 0.95
    assert f"ran at {promoted['point']}" in " ".join(result.stdout.split())
    # Every command as a user would type it, in this order.
    commands = [
        line.split()[2] for line in result.stdout.splitlines() if line.startswith("$ fathom")
    ]
    assert commands == ["generate", "tune", "serve", "promote"]

    client = mlflow.MlflowClient(f"sqlite:///{work / 'study' / 'mlflow.db'}")
    (version,) = client.search_model_versions(f"name = '{promoted['model']}'")
    assert client.get_model_version_by_alias(promoted["model"], "production").version == (
        version.version
    )
    experiment = client.get_experiment_by_name("fathom-tune")
    assert experiment is not None
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{version.run_id}'"
    )
    trials = [each for each in children if each.info.run_name.startswith("trial-")]
    assert len(trials) == TRIALS
