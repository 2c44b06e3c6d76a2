"""``fathom eval``: what each mode costs in quality, and what it brings, beside full depth."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom import __version__
from fathom.commands.options import (
    UsageError,
    add_command,
    add_compute_options,
    add_engine_options,
    compute_policy,
    engine_values,
)
from fathom.commands.tracing import add_trace_option, check_trace, trace_file
from fathom.config import EngineConfig
from fathom.types import ComputePolicy

if TYPE_CHECKING:
    from fathom.engine.engine import Engine
    from fathom.engine.trace import TraceListener
    from fathom.evaluation.partial import Partial
    from fathom.evaluation.run import Load
    from fathom.evaluation.session import Row, Session

_EXAMPLES = """\
  fathom eval --tasks gsm8k,dialogsum --modes full,exact,free --limit 100 --json out.json
  fathom eval --tasks gsm8k,dialogsum --modes full,exact,free --limit 100 --json out.json --resume
  fathom eval --tasks multi30k --data multi30k=pairs.jsonl --modes full,free --exit-threshold 0.8
  fathom eval --tasks multi30k --modes free@0.6,copy@0.6,random,static --trace drafts.parquet
  fathom eval --tasks choice,wikitext2 --base
  fathom eval --tasks spec_bench --limit 10 --runs 3

modes: full and exact are lossless; rollback, free and copy (CALM's state copying) are lossy; each
alone or with its exit threshold (free@0.8). To compare with: static (every token leaves at the
exit) and random (free, with exits drawn at the rate of the free before it).

tasks: gsm8k (exact_match), dialogsum and scitldr (rougeL), multi30k (German to English, bleu),
spec_bench (a row a category: depth and speed alone), choice or any of arc_easy, piqa, copa,
boolq, openbook_qa, winogrande (acc_norm, acc), wikitext2 (perplexity a token).

Generation tasks also say how far a mode is from the full model, which holds where a task is beyond
the model: rougeL_to_full (of its answer to full's), nll_under_full (nats a token of its answer).
agreement is how often the exit head's best token is the full model's, at every token of its answer.
Multiple choice and perplexity are scored at full depth, so they have a row of mode full alone.

data: the folder that FATHOM_DATA names; --data TASK=FILE takes a file of the same fields in place
of a task's own (.jsonl or .txt, also with .gz).
"""

_CHOICE = "choice"


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = add_command(
        commands, "eval", run, about="measure quality, depth and speed of modes", examples=_EXAMPLES
    )
    parser.add_argument("--tasks", metavar="LIST", help="what to evaluate, see below")
    parser.add_argument(
        "--modes", metavar="LIST", help="see below; full is always among them (default: "
        "full,exact,free)",
    )  # fmt: skip
    parser.add_argument(
        "--base", action="store_true", help="the untouched model: no adapter, mode full alone"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="first N rows a task; a category in spec_bench"
    )
    parser.add_argument(
        "--new-tokens", type=int, metavar="N", help="most tokens an answer (default: the task's)"
    )
    parser.add_argument(
        "--runs", type=int, default=1, metavar="N", help="answer all N times, for timing alone"
    )
    parser.add_argument(
        "--no-agreement",
        action="store_true",
        help="leave out the pass that asks the exit head at every token",
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="TASK=FILE", help="instead of the task's own"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write meta and rows here")
    parser.add_argument("--resume", action="store_true", help="go on with OUT.partial")
    add_trace_option(parser)
    add_compute_options(parser, mode=False)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check the options and read the data, measure, print the table, write the JSON."""
    from fathom.evaluation.errors import EvaluationError
    from fathom.evaluation.job import describe_job, is_complete
    from fathom.evaluation.partial import Partial

    config = _config(args)
    try:
        points = _points(args, config.compute)
    except EvaluationError as error:
        raise UsageError(str(error)) from error
    _check_numbers(args)
    check_trace(args)
    if args.trace is not None and (args.base or args.no_agreement):
        raise UsageError(
            "--trace writes what the pass over every token has seen, which --no-agreement and "
            "--base leave out."
        )
    loads = _loads(args)
    settings = {name: getattr(args, name) for name in ("limit", "new_tokens", "runs")}
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


def _config(args: argparse.Namespace) -> EngineConfig:
    values = {"max_num_seqs": 8, **engine_values(args)}
    if args.base:
        if values.get("adapter", "none") != "none":
            raise UsageError("--base is the model without an adapter; leave one of the two out.")
        values["adapter"] = "none"
    # Off: the second mode would find the first one's blocks.
    config = EngineConfig(compute=compute_policy(args), prefix_caching=False, **values)
    config.validate()
    return config


def _points(args: argparse.Namespace, compute: ComputePolicy) -> dict[str, ComputePolicy]:
    from fathom.evaluation.points import read_points

    default = "full" if args.base else "full,exact,free"
    names = [name.strip() for name in (args.modes or default).split(",")]
    points = read_points(names, compute)
    if args.base and set(names) != {"full"}:
        raise UsageError(
            "--base has no exit head, so it has mode full alone; leave --modes or --base out."
        )
    return points


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("limit", "new_tokens", "runs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if args.resume and args.json is None:
        raise UsageError("--resume needs --json OUT, the evaluation to go on with.")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UsageError(f"{args.json}: there is no such folder; make it first.")


def _loads(args: argparse.Namespace) -> list[Load]:
    """The tasks with their data; a fault in the data shows before the model is loaded."""
    from fathom.evaluation.data import data_file
    from fathom.evaluation.run import load
    from fathom.evaluation.tasks import TASKS, ChoiceTask

    groups = {_CHOICE: [name for name, task in TASKS.items() if isinstance(task, ChoiceTask)]}
    known = ", ".join([*TASKS, *groups])
    if not args.tasks:
        raise UsageError(f"say what to evaluate: --tasks with a list of {known}.")
    names: list[str] = []
    for name in (part.strip() for part in args.tasks.split(",")):
        if name not in TASKS and name not in groups:
            raise UsageError(f"--tasks must be a list of {known}, got {name!r}.")
        names += groups.get(name, [name])
    files: dict[str, Path] = {}
    for text in args.data:
        name, equals, file = text.partition("=")
        if not equals or not file or name not in names:
            raise UsageError(f"--data must be TASK=FILE with one of the --tasks, got {text!r}.")
        if not Path(file).is_file():
            raise UsageError(f"--data {text}: there is no such file.")
        files[name] = Path(file)
    return [
        load(TASKS[name], files.get(name) or data_file(name, TASKS[name].file), args.limit)
        for name in dict.fromkeys(names)
    ]


def _measure(
    args: argparse.Namespace,
    config: EngineConfig,
    points: dict[str, ComputePolicy],
    loads: Sequence[Load],
    job: dict[str, Any],
    partial: Partial,
) -> int:
    from rich.console import Console

    from fathom.models.resolve import resolve_model

    resolve_model(config.model)  # before the seconds that torch takes to load
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
