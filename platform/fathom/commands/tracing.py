"""``--trace FILE``: what every draft of a run was worth, for calibration and tuning."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.options import UsageError

if TYPE_CHECKING:
    from fathom.engine.engine import Engine
    from fathom.engine.trace import DraftRecord


def add_trace_option(parser: Any, *, hidden: bool = True) -> None:
    """Declare ``--trace``, and ``--trace-hidden`` where the command can write exit states."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write confidence and agreement of every draft to this Parquet file",
    )
    if hidden:
        parser.add_argument(
            "--trace-hidden",
            action="store_true",
            help="write the exit states as well, for `fathom calibrate meta`; the file is large",
        )


def check_trace(args: argparse.Namespace) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        UsageError: if the file cannot be written there.
    """
    if args.trace is None and getattr(args, "trace_hidden", False):
        raise UsageError("--trace-hidden needs --trace FILE, where the exit states go.")
    if args.trace is not None and not args.trace.absolute().parent.is_dir():
        raise UsageError(f"{args.trace}: there is no such folder; make it first.")


@contextmanager
def trace_file(engine: Engine, path: Path | None) -> Iterator[Callable[[DraftRecord], None]]:
    """A trace that is open while the context lasts: what writes a record; nothing without a path.

    Args:
        engine: whose drafts they are; the file's metadata name it.
    """
    if path is None:
        yield lambda record: None
        return
    from fathom.tuning.traces import TraceWriter, describe

    with TraceWriter(path, describe(engine)) as writer:
        yield writer.add


@contextmanager
def traced(engine: Engine, path: Path | None, *, hidden: bool = False) -> Iterator[None]:
    """Trace an engine while the context lasts; without a path, do nothing.

    Args:
        hidden: whether exit states are written as well.
    """
    if path is None:
        yield
        return
    with trace_file(engine, path) as write:
        engine.trace(write, hidden=hidden)
        try:
            yield
        finally:
            engine.trace(None)
