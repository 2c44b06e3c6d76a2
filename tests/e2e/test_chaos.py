"""The drills as an operator runs them: nothing is lost while processes die."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.command_line import COMMAND, environment


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_request_notices_that_processes_die(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *COMMAND, "chaos", "--requests", "12", "--concurrency", "4", "--new-tokens", "72",
            "--kill-every", "2.5", "--seed", "53", "--json", "chaos.json",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        timeout=560,
        check=False,
    )  # fmt: skip
    assert (tmp_path / "chaos.json").exists(), result.stderr
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert result.returncode == 0, (report, result.stderr)
    assert report["requests"] == 12
    assert report["kills"] >= 3
    for fault in ("failed", "gaps", "duplicates", "mismatches", "leaked_blocks"):
        assert report[fault] == 0
    assert [each["kind"] for each in report["plan"][:3]] == ["deep", "ingress", "shallow"]
    assert report["recovered"] is True
    assert report["meta"]["interrupted"] is False
