"""``fathom train``: what cannot end well is refused before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import Fathom, fathom

__all__ = ["fathom"]

EXITS = "train exits --exit-layer 2 --work-dir w --out o --data"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (f"{EXITS} none.jsonl", "none.jsonl: no such file"),
        (f"{EXITS} a.jsonl --steps 0", "--steps must be at least 1, got 0"),
        (f"{EXITS} a.jsonl --check-every 0", "check_every must be at least 1, got 0"),
        (f"{EXITS} a.jsonl --subset -1", "subset must be at least 0 (0: all tokens), got -1"),
        ("train probe --data none.jsonl", "none.jsonl: no such file"),
        ("train probe --data a.jsonl --examples 0", "--examples must be at least 1, got 0"),
        ("train probe --data a.jsonl --json none/out.json", "there is no such folder"),
    ],
)
def test_usage_errors(fathom: Fathom, tmp_path: Path, args: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    result = fathom(*args.split())
    assert result.returncode != 0
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}
