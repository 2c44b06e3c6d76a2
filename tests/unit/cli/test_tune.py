"""``fathom tune``: what it refuses before anything is started, and that its help is true."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from fathom.cli import main
from fathom.tuning.study import load_study
from tests.traces import write_trace


def test_the_study_in_the_help_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    example = capsys.readouterr().out.split("study.yaml:\n")[1].split("\n\n")[0]
    path = tmp_path / "study.yaml"
    path.write_text(textwrap.dedent(example))
    study = load_study(path)
    assert study.traces == ("t.parquet",) and study.constraints.max_quality_loss == 0.05
    assert study.space.dimensions()["max_stack"].high == 16


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("traces: [none.parquet]", [], "none.parquet: cannot read the trace"),
        ("traces: [t.parquet]\ntrials: none", [], "trials must be at least 1, got 'none'"),
        ("traces: [t.parquet]", ["--parallel", "-1"], "--parallel must be at least 0, got -1"),
        ("traces: [t.parquet]", ["--json", "no/where.json"], "no such folder"),
        ("traces: [", [], "no valid YAML"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "t.parquet", requests=4)
    Path("study.yaml").write_text(text)
    assert main(["tune", "study.yaml", *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not Path("tune-study").exists()
