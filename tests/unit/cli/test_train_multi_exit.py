"""``fathom train multi-exit`` from files to a folder, and the option that serves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fathom.cli import build_parser, main
from fathom.commands.serve import serve_config
from fathom.models.classifier_files import read_classifier
from tests.tiny_classifiers import save_random_bert, write_texts


def test_a_classifier_is_trained_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    data = write_texts(tmp_path / "rows.jsonl", 120)
    command = [
        "train", "multi-exit", "--data", str(data), "--encoder",
        str(save_random_bert(tmp_path / "bert")), "--max-tokens", "16", "--hidden", "0",
        "--epochs", "1", "--learning-rate", "0.01", "--seed", "4", "--mlflow", "none",
        "--work-dir", str(tmp_path / "run"), "--out", str(tmp_path / "mood"),
    ]  # fmt: skip
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mood")
    files = read_classifier(tmp_path / "mood")
    assert files.name == "mood" and files.labels == ("blame", "praise")
    assert len(files.calibration.labels) == 12  # a tenth
    wanted = {"seed": 4, "epochs": 1, "hidden": 0, "learning_rate": 0.01, "tune": False}
    assert wanted.items() <= files.notes["training"].items()
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    trained = checkpoint.stat().st_mtime_ns
    assert main(command) == 0  # nothing left to train
    assert checkpoint.stat().st_mtime_ns == trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exits", "1,x"], "--exits must be numbers of blocks like 1,4,7, got '1,x'"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--data", "none.jsonl"], "none.jsonl: cannot read"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    data = write_texts(tmp_path / "rows.jsonl", 10)
    command = ["train", "multi-exit", "--data", str(data), "--mlflow", "none"]
    command += ["--work-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *options]
    assert main(command) != 0
    assert message in capsys.readouterr().err


def test_a_classifiers_folder_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # replicas have another working directory
    args = build_parser().parse_args(["serve", "--classifier", "mood"])
    assert serve_config(args).classifier == str(tmp_path / "mood")
    assert serve_config(build_parser().parse_args(["serve"])).classifier == ""
