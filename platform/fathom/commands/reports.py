"""What commands that measure have in common: options, the machine's description, the file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fathom import __version__
from fathom.commands.options import UsageError
from fathom.types import AcceptMode


def mode_list(text: str) -> list[AcceptMode]:
    """The modes of ``--modes``, without repetitions.

    Raises:
        UsageError: for an unknown one.
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in list(AcceptMode)]
    if unknown:
        known = ", ".join(AcceptMode)
        raise UsageError(f"--modes must be a list of {known}, got {unknown[0]!r}.")
    return [AcceptMode(name) for name in dict.fromkeys(names)]


def batch_list(text: str) -> list[int]:
    """The batch sizes of ``--batch``, without repetitions.

    Raises:
        UsageError: for what is no number of at least 1.
    """
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise UsageError(f"--batch must be a list of integers of at least 1, got {text!r}.")
    return list(dict.fromkeys(batches))


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Check that options are 1 or more.

    Raises:
        UsageError: naming the first that is not.
    """
    for name in names:
        value = getattr(args, name)
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def check_output(path: Path | None) -> None:
    """Check that a report can be written, before hours of measuring.

    Raises:
        UsageError: if its folder does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no such folder; make it first.")


def machine() -> dict[str, Any]:
    """The command line, the machine and the versions: what a figure is worth nothing without."""
    from fathom.commands.doctor import cpu_model

    return {
        "command": "fathom " + " ".join(sys.argv[1:]),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "fathom": __version__,
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
        },
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)
