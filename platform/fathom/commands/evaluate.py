"""``fathom eval``: what each mode costs in quality, and what it brings, beside full depth."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fathom import __version__
from fathom.commands.eval_options import (
    EXAMPLES,
    add_options,
    check_options,
    engine_config,
    read_loads,
    read_modes,
)
from fathom.commands.options import UsageError, add_command
from fathom.commands.tracing import trace_file
from fathom.config import EngineConfig
from fathom.types import ComputePolicy

if TYPE_CHECKING:
    from fathom.engine.engine import Engine
    from fathom.engine.trace import TraceListener
    from fathom.evaluation.partial import Partial
    from fathom.evaluation.run import Load
    from fathom.evaluation.session import Row, Session


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "eval", run, about="measure quality, depth and speed of modes", examples=EXAMPLES
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check the options and read the data, measure, print the table, write the JSON."""
    from fathom.evaluation.errors import EvaluationError
    from fathom.evaluation.job import describe_job, is_complete
    from fathom.evaluation.partial import Partial

    config = engine_config(args)
    points = read_modes(args, config.compute)
    check_options(args)
    loads = read_loads(args)
    settings = {name: getattr(args, name) for name in ("limit", "new_tokens", "runs")}
    settings["agreement"] = not args.no_agreement
    job = describe_job(config, list(points), loads, settings)
    path = None if args.json is None else args.json.with_name(args.json.name + ".partial")
    try:
        if path is not None and is_complete(args.json, path, job, resume=args.resume):
            print(f"{args.json}: the evaluation is complete", file=sys.stderr)
            return 0
        partial = Partial(path, job)
    except EvaluationError as error:
        raise UsageError(str(error)) from error
    try:
        return _measure(args, config, points, loads, job, partial)
    except BaseException:
        if path is not None:
            if len(partial):
                print(f"fathom: {path} holds what was measured: --resume", file=sys.stderr)
            else:
                partial.remove()
        raise


def _measure(
    args: argparse.Namespace,
    config: EngineConfig,
    points: dict[str, ComputePolicy],
    loads: Sequence[Load],
    job: dict[str, Any],
    partial: Partial,
) -> int:
    from rich.console import Console

    from fathom.commands.terminal import describe_mode
    from fathom.engine.engine import Engine
    from fathom.evaluation.report import WIDTH, build_table

    notes = Console(stderr=True)
    with notes.status("loading the model and measuring its stages", refresh_per_second=2):
        engine = Engine.from_config(config)
    with trace_file(engine, args.trace) as on_draft:
        session, rows = _rows(
            args, engine, points, loads, partial, notes, on_draft, max_num_seqs=config.max_num_seqs
        )
    for each in loads:
        if cut := session.truncated.get(each.task.name):
            notes.print(f"{each.task.name}: {cut} texts were cut to fit into the context")
    meta = _meta(engine, job, session)
    title = f"{engine.info.model}, {engine.info.dtype}, adapter {engine.info.adapter or 'none'}"
    # A table that loses columns to a narrow terminal loses its sense: let it wrap instead.
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(build_table(rows, title, describe_mode))
    if args.json is not None:
        temporary = args.json.with_name(args.json.name + ".tmp")
        temporary.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
        os.replace(temporary, args.json)
        partial.remove()
    return 0


def _rows(
    args: argparse.Namespace,
    engine: Engine,
    points: dict[str, ComputePolicy],
    loads: Sequence[Load],
    partial: Partial,
    notes: Any,
    on_draft: TraceListener,
    *,
    max_num_seqs: int,
) -> tuple[Session, list[Row]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    from fathom.evaluation.answers import Advance
    from fathom.evaluation.probe import traced_drafts
    from fathom.evaluation.run import evaluate
    from fathom.evaluation.session import Session

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    # Redrawn as requests end, never in between: the runs are timed.
    with Progress(*columns, console=notes, auto_refresh=False) as bar:

        def progress(label: str, total: int) -> Advance:
            task = bar.add_task(label, total=total)
            return lambda: bar.update(task, advance=1, refresh=True)

        session = Session(
            engine=engine,
            partial=partial,
            policies=points,
            runs=args.runs,
            # Enough for the slots to stay filled most of the time.
            block=4 * max_num_seqs,
            new_tokens=args.new_tokens,
            limit=args.limit,
            progress=progress,
            probe=None if args.no_agreement else traced_drafts,
            on_draft=on_draft,
        )
        rows = [row for found in evaluate(session, loads) for row in found]
    return session, rows


def _meta(engine: Engine, job: dict[str, Any], session: Session) -> dict[str, Any]:
    """What is needed to read the rows and to measure them again."""
    import torch

    from fathom.commands.doctor import cpu_model
    from fathom.evaluation.job import describe_engine, library_versions

    return {
        "command": "fathom " + " ".join(sys.argv[1:]),
        "job": job,
        **describe_engine(engine.info),
        "truncated": session.truncated,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "fathom": __version__,
            "python": platform.python_version(),
            **library_versions(),
        },
    }
