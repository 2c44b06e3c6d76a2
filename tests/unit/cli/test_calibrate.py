"""``fathom calibrate`` and ``fathom bench policies``, as users run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.exits.meta import MetaClassifier
from fathom.tuning.operating_points import load
from tests.traces import write_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.parquet"
    write_trace(path, requests=80, temperature=1.5, hidden=True)
    return path


def test_a_report_is_drawn_printed_and_written(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "report", tmp_path / "report.json"
    assert main(["calibrate", "report", str(trace), "--out", str(out), "--json", str(file)]) == 0
    for name in ("reliability.png", "exits.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    body = json.loads(file.read_text())
    found = {(m["confidence"], m["temperature"] == 1): m for m in body["measures"]}
    assert len(found) == 7  # four measures, three of them at two temperatures
    # The trace was made with a temperature of 1.5.
    assert body["temperature"]["temperature"] == pytest.approx(1.5, rel=0.25)
    assert found["max_prob", False]["ece"] < found["max_prob", True]["ece"]
    for measure in body["measures"]:
        assert sum(b["count"] for b in measure["bins"]) == body["rows"]
    assert found["max_prob", True]["auroc"] > 0.6 > found["saturation", True]["auroc"] > 0.4
    printed = capsys.readouterr().out
    assert "40 held-out requests" in printed and "saturation" in printed


def test_points_are_fitted(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "points.yaml"
    assert main(["calibrate", "fit", str(trace), "--out", str(out), "--risk", "0.3"]) == 0
    assert set(load(out).points) == {"exact", "balanced", "fast"}
    assert "certificates" in capsys.readouterr().out


def test_the_meta_classifier_learns_from_exit_states(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "meta.safetensors"
    assert main(["calibrate", "meta", str(trace), "--out", str(out)]) == 0
    model = MetaClassifier.load(out, "weights-1")
    assert model.metadata["adapter_digest"] == "adapter-1"
    report = ["calibrate", "report", str(trace), "--out", str(tmp_path), "--meta", str(out)]
    assert main([*report, "--json", str(tmp_path / "r.json")]) == 0
    measures = json.loads((tmp_path / "r.json").read_text())["measures"]
    auroc = {m["confidence"]: m["auroc"] for m in measures}
    # One component of the states tells of agreement; no logit knows as much.
    assert auroc["meta"] > 0.9 > max(v for name, v in auroc.items() if name != "meta")
    assert "meta" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["report", "none.parquet", "--out", "r"], "none.parquet: cannot read the trace"),
        (["fit", "{trace}", "--out", "no/points.yaml"], "there is no such folder"),
        (["fit", "{trace}", "--out", "p.yaml", "--risk", "2"], "--risk must be between 0 and 1"),
        (["fit", "{left}", "--out", "p.yaml"], "rows left at the exit when it was recorded"),
        (["meta", "{left}", "--out", "m"], "rows left at the exit"),
        (["meta", "{bare}", "--out", "m"], "record it again with --trace-hidden"),
        ([], "fathom calibrate report, fit or meta"),
    ],
)
def test_what_cannot_be_used_is_said(
    trace: Path,
    tmp_path: Path,
    args: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "left.parquet", requests=3, exited=True)
    write_trace(tmp_path / "bare.parquet", requests=3)
    names = {"trace": trace, "left": "left.parquet", "bare": "bare.parquet"}
    code = main(["calibrate", *(arg.format(**names) for arg in args)])
    assert code == 2
    assert says in capsys.readouterr().err


def test_policies_are_measured(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "policies.json"
    args = ["bench", "policies", "--trace", str(trace), "--json", str(out), "--seeds", "1"]
    assert main([*args, "--splits", "5"]) == 0
    body = json.loads(out.read_text())
    assert len(body["budget"]) == 8
    assert {row["splits"] for row in body["risk"]} == {5}
    assert body["meta"]["traces"][0]["requests"] == 80
    assert body["meta"]["weights_digest"] == "weights-1"
    printed = capsys.readouterr().out
    assert "overhead" in printed and "betting" in printed
    assert main([*args, "--trace", str(trace), "--trace", str(trace)]) == 2
    assert "--trace can be given once or twice, got 3" in capsys.readouterr().err
    assert main([*args, "--exit-temperature", "9"]) == 2
    assert "--exit-temperature must be from 0.25 to 4" in capsys.readouterr().err
