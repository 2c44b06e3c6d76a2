"""Options of ``fathom eval``, and what they stand for: engine, points, tasks with their data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.options import (
    UsageError,
    add_compute_options,
    add_engine_options,
    compute_policy,
    engine_values,
)
from fathom.commands.tracing import add_trace_option, check_trace
from fathom.config import EngineConfig
from fathom.types import ComputePolicy

if TYPE_CHECKING:
    from fathom.evaluation.run import Load

EXAMPLES = """\
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

OUT is {"meta": ..., "rows": [{"task", "mode", "n", "metric", "value", "ci_low", "ci_high",
"agreement", "acceptance", "exit_rate", "coverage_at_precision_95", "layers_per_token",
"tokens_per_s", "speedup_over_full"}]}, a row a metric. What was not measured is null: metric and
value in spec_bench; agreement and coverage in mode full and with --no-agreement; acceptance where
no draft is verified; depth and speed of multiple choice and perplexity.

data: the folder that FATHOM_DATA names; --data TASK=FILE takes a file of the same fields in place
of a task's own (.jsonl or .txt, also with .gz).
"""

_CHOICE = "choice"


def add_options(parser: Any) -> None:
    """Declare the options."""
    parser.add_argument("--tasks", metavar="LIST", help="what to evaluate, see below")
    parser.add_argument(
        "--modes", metavar="LIST", help="see below; full is always among them (default: "
        "full,exact,free)",
    )  # fmt: skip
    parser.add_argument(
        "--base", action="store_true", help="the untouched model: no adapter, mode full alone"
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="first N rows a task; a category in spec_bench; windows of 512 tokens in wikitext2",
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
    # Its probe keeps what it has seen as JSON: no place for exit states.
    add_trace_option(parser, hidden=False)
    add_compute_options(parser, mode=False)
    add_engine_options(parser)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Of the engine that is evaluated.

    Raises:
        UsageError: for options that exclude each other.
    """
    # A point's quality must not depend on how fast this machine is.
    values = {"max_num_seqs": 8, "pause_drafting": False, **engine_values(args)}
    if args.base:
        if values.get("adapter", "none") != "none":
            raise UsageError("--base is the model without an adapter; leave one of the two out.")
        values["adapter"] = "none"
    # Off: the second mode would find the first one's blocks.
    config = EngineConfig(compute=compute_policy(args), prefix_caching=False, **values)
    config.validate()
    return config


def read_modes(args: argparse.Namespace, compute: ComputePolicy) -> dict[str, ComputePolicy]:
    """The points of ``--modes``, by name.

    Raises:
        UsageError: for one that cannot be read, one that ``--base`` does not have, or where there
            would be nothing to trace.
    """
    from fathom.evaluation.errors import EvaluationError
    from fathom.evaluation.points import read_points

    default = "full" if args.base else "full,exact,free"
    names = [name.strip() for name in (args.modes or default).split(",")]
    try:
        points = read_points(names, compute)
    except EvaluationError as error:
        raise UsageError(str(error)) from error
    if args.base and set(names) != {"full"}:
        raise UsageError(
            "--base has no exit head, so it has mode full alone; leave --modes or --base out."
        )
    if args.trace is not None and not args.base and not any(p.drafts for p in points.values()):
        raise UsageError("--trace writes drafts, and none of --modes makes any: name exact, say.")
    return points


def check_options(args: argparse.Namespace) -> None:
    """Check numbers and files before anything is read.

    Raises:
        UsageError: naming the first option that cannot be used.
    """
    for name in ("limit", "new_tokens", "runs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if args.resume and args.json is None:
        raise UsageError("--resume needs --json OUT, the evaluation to go on with.")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UsageError(f"{args.json}: there is no such folder; make it first.")
    if args.json is not None and args.json.is_dir():
        raise UsageError(f"--json {args.json}: is a folder; name a file in it.")
    check_trace(args)
    if args.trace is not None and (args.base or args.no_agreement):
        raise UsageError(
            "--trace writes what the pass over every token has seen, which --no-agreement and "
            "--base leave out."
        )


def read_loads(args: argparse.Namespace) -> list[Load]:
    """The tasks with their data; a fault in the data shows before the model is loaded.

    Raises:
        UsageError: for an unknown task or a file that is not there. EvaluationError: for a file
            that cannot be read.
    """
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
