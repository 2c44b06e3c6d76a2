"""The command line as users run it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Fathom = Callable[..., subprocess.CompletedProcess[str]]

COMMAND = (sys.executable, "-m", "fathom.cli")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what would change the output."""
    hidden = {"FATHOM_DEBUG", "FATHOM_API_KEY", "NO_COLOR", "FORCE_COLOR"}
    return {k: v for k, v in os.environ.items() if k not in hidden} | changes


@pytest.fixture
def fathom(tmp_path: Path) -> Fathom:
    """Runs ``fathom`` in an empty folder; nothing on standard input unless given."""

    def run(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = (*COMMAND, *args)
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(**env),
            timeout=240,
            check=False,
        )

    return run
