"""The command line as users run it, in a process of its own; or in this one, which is cheaper."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fathom.cli import main

Fathom = Callable[..., subprocess.CompletedProcess[str]]

COMMAND = (sys.executable, "-m", "fathom.cli")


HIDDEN = ("FATHOM_DEBUG", "FATHOM_API_KEY", "NO_COLOR", "FORCE_COLOR")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what would change the output."""
    return {k: v for k, v in os.environ.items() if k not in HIDDEN} | changes


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


@pytest.fixture
def fathom_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Fathom:
    """As ``fathom``, in this process: for what ends before anything is loaded or started."""

    def run(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        for name in HIDDEN:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            code = main(args)
        except SystemExit as end:  # argparse's way
            code = int(end.code or 0)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, said.out, said.err)

    return run
