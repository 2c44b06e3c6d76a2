"""A process of vLLM's outlives the Ray cluster whose KV store it uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_client_of_the_store_outlives_its_cluster() -> None:
    script = Path(__file__).with_name("lost_cluster.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
