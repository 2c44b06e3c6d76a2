"""A cluster of three nodes on this machine that loses the deep replica's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.apart import engine_settings, in_one_process, requests_of, save_model
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


def test_three_nodes_and_the_loss_of_one(tiny_model: Path, tmp_path: Path) -> None:
    settings = engine_settings(save_model(tmp_path / "model", tiny_model))
    result = tmp_path / "result.json"
    process = subprocess.run(
        [sys.executable, "-m", "tests.integration.three_nodes", settings.model, str(result)],
        cwd=Path(__file__).parents[2],
        # Whatever else runs on this machine: Ray would kill actors when memory is short.
        env={**os.environ, "RAY_memory_monitor_refresh_ms": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["nodes"] == 2  # and the ingress on the head
    assert found["unfinished"] > 0
    assert found["moved"]
    for name, requests in (
        ("first", requests_of(seed=1)),
        ("second", requests_of(seed=5, count=4, max_tokens=400)),
    ):
        given = [[tuple(token) for token in tokens] for tokens in found[name]]
        assert given == in_one_process(settings, requests)
