"""Commands of Fathom, run and shown as a user would type them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path


def say(*words: object) -> None:
    """Show a command."""
    print("\n$ fathom " + shlex.join(str(each) for each in words), flush=True)


def fathom(*words: object) -> None:
    """Show a command and run it.

    Raises:
        SystemExit: with its status if it fails; it has said why.
    """
    say(*words)
    command = [sys.executable, "-m", "fathom.cli", *(str(each) for each in words)]
    if status := subprocess.run(command, check=False).returncode:
        raise SystemExit(status)


def record_trace(prompts: Path, trace: Path, *options: object) -> None:
    """Record a trace that a study can use: no confidence is above 1, so that no row leaves.

    The answers go beside it. Those that an interrupted recording has left are dropped: their rows
    are in no trace.

    Raises:
        SystemExit: as ``fathom``.
    """
    answers = trace.with_name("answers.jsonl")
    answers.with_name(answers.name + ".partial").unlink(missing_ok=True)
    fathom(
        "generate", "--prompts", prompts, "--json", answers, "--mode", "free",
        "--exit-threshold", 1, "--trace", trace, *options,
    )  # fmt: skip
