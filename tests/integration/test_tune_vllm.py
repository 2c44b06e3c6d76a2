"""Served studies with vLLM as their baseline: missing, measured, and kept.

What needs vLLM runs where ``FATHOM_VLLM_PYTHON`` names its interpreter; see
``test_vllm_replicas.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fathom.cli import main
from tests.tiny_models import tiny_model
from tests.tuned import record

pytest.importorskip("optuna")
mlflow = pytest.importorskip("mlflow")

__all__ = ["tiny_model"]

PYTHON = os.environ.get("FATHOM_VLLM_PYTHON", "")
LIVE: dict[str, Any] = {"prompts": ["p.jsonl"], "requests": 4, "new_tokens": 8, "cpus": 0.9}
STUDY: dict[str, Any] = {
    "traces": ["t.parquet"],
    "evaluate": "served",
    "objectives": ["throughput", "quality"],
    "space": {
        "mode": "free", "exit_threshold": 0.002, "pause_drafting": False, "max_num_seqs": 4,
        "flush_rule": "eager", "replica_ratio": "fused",
    },
    "searcher": "grid",
    "finalists": 1,
}  # fmt: skip

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    path = tmp_path_factory.mktemp("study")
    # vLLM's attention on a CPU has heads of 32 and more.
    record(
        path, tiny_model, prompts=10, new_tokens=12,
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return path


def tune(folder: Path, monkeypatch: pytest.MonkeyPatch, vllm: dict[str, Any]) -> dict[str, Any]:
    """Run the study, or go on with it; returns its report."""
    body = {**STUDY, "live": {**LIVE, "baseline": "vllm", "vllm": vllm}}
    (folder / "small.yaml").write_text(yaml.safe_dump(body))
    monkeypatch.chdir(folder)
    assert main(["tune", "small.yaml", "--parallel", "1", "--json", "out.json"]) == 0
    report: dict[str, Any] = json.loads((folder / "out.json").read_text())
    front = json.loads((folder / "tune-small" / "front.json").read_text())
    assert front["baseline"] == report["baseline"]
    return report


def parent(folder: Path, report: dict[str, Any]) -> Any:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'tune-small' / 'mlflow.db'}")
    return client.get_run(report["mlflow_run_id"]).data


def kept(folder: Path) -> dict[str, int]:
    files = (folder / "tune-small" / "live").glob("*.json")
    return {path.name: path.stat().st_mtime_ns for path in files}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_study_ends_well_without_vllm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tune(folder, monkeypatch, {})
    assert "this environment has no vLLM" in report["baseline"]["missing"]
    assert report["replay_error"] and report["front"]
    assert "vLLM, full depth: not measured: " in capsys.readouterr().out
    data = parent(folder, report)
    assert "this environment has no vLLM" in data.tags["fathom.baseline"]
    assert "baseline_tpot_ms" not in data.metrics
    assert not [name for name in kept(folder) if name.startswith("baseline")]

    report = tune(folder, monkeypatch, {"python": "/nowhere/bin/python"})
    assert "live.vllm.python /nowhere/bin/python is no program" in report["baseline"]["missing"]


@pytest.mark.skipif(not PYTHON, reason="FATHOM_VLLM_PYTHON names no interpreter with vLLM")
def test_finalists_are_compared_with_vllm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without compilation, which takes a minute.
    vllm = {"python": PYTHON, "arguments": {"enforce_eager": True}}
    report = tune(folder, monkeypatch, vllm)
    baseline = report["baseline"]
    assert baseline["name"] == "vLLM, full depth"
    assert baseline["tpot_ms"] > 0 and baseline["tokens_per_s"] > 0
    assert (baseline["requests"], baseline["max_num_seqs"], baseline["cpus"]) == (4, 4, 0.9)
    assert 4 <= baseline["tokens"] <= 4 * LIVE["new_tokens"]
    (row,) = baseline["finalists"]
    assert row["point"] == "front-1"
    assert row["speedup"] == pytest.approx(baseline["tpot_ms"] / row["tpot_ms"])
    assert row["throughput_ratio"] == pytest.approx(row["tokens_per_s"] / baseline["tokens_per_s"])
    assert baseline["over_full"] == pytest.approx(row["full_tpot_ms"] / baseline["tpot_ms"])
    said = capsys.readouterr().out
    assert "× the speed of our full" in said and "front-1, full" in said
    data = parent(folder, report)
    assert data.tags["fathom.baseline"] == baseline["name"]
    assert data.metrics["baseline_tpot_ms"] == baseline["tpot_ms"]
    assert data.metrics["baseline_tokens_per_s"] == baseline["tokens_per_s"]

    before = kept(folder)
    assert tune(folder, monkeypatch, vllm)["baseline"] == baseline
    assert kept(folder) == before
