"""``fathom generate``: one answer on the terminal, or a file of prompts as one batch job."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.options import (
    UsageError,
    add_command,
    add_compute_options,
    add_engine_options,
    add_sampling_options,
    engine_values,
    sampling_params,
)
from fathom.commands.points import add_point_options, compute_at, points_of
from fathom.commands.prompts import Prompt, check_lengths, encode_prompt, read_prompts
from fathom.commands.records import Completion, ResultsFile
from fathom.commands.tracing import add_trace_option, check_trace, traced
from fathom.config import EngineConfig
from fathom.types import FinishReason, Request

if TYPE_CHECKING:
    from fathom.engine.engine import Engine
    from fathom.tuning.operating_points import OperatingPoints

_EXAMPLES = """\
  fathom generate "Why is the sky blue?"
  fathom generate --mode free --exit-threshold 0.7 "Write a haiku about rain."
  echo "The capital of France is" | fathom generate --raw --new-tokens 8
  fathom generate --prompts prompts.jsonl --json answers.jsonl --mode exact
  fathom generate --prompts prompts.jsonl --json answers.jsonl --resume
  fathom generate --operating-points points.yaml --operating-point balanced "Why is the sky blue?"

a line of prompts.jsonl is {"prompt": "raw text"} or
{"messages": [{"role": "user", "content": "..."}]}, which goes through the chat template.

modes: full (every layer) and exact (drafts verified) give the full model's output; rollback
(drafts kept while likely enough) and free (drafts stay) trade quality for speed.
"""


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = add_command(
        commands,
        "generate",
        run,
        about="generate text, coloured by the depth of each token",
        examples=_EXAMPLES,
    )
    parser.add_argument("prompt", nargs="?", help="the prompt; without it, standard input is read")
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON lines, as one batch job")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="results of --prompts (default: standard output)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted job")
    add_trace_option(parser)
    add_sampling_options(parser)
    add_compute_options(parser)
    add_point_options(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without the model, then generate."""
    points = points_of(args)
    config = EngineConfig(compute=compute_at(args, points), **engine_values(args))
    config.validate()
    sampling_params(args)
    check_trace(args)
    if args.prompts is None:
        if args.json is not None or args.resume:
            raise UsageError("--json and --resume belong to --prompts FILE.")
        return _stream(args, config, points, _read_prompt(args))
    if args.prompt is not None or args.raw:
        raise UsageError("give a prompt or --prompts FILE, not both (--raw is for a prompt).")
    if args.resume and args.json is None:
        raise UsageError("--resume needs --json OUT, the file to go on with.")
    if args.json is not None and args.json.resolve() == args.prompts.resolve():
        raise UsageError("--json would overwrite the prompts; name another file.")
    return _batch(args, config, points, read_prompts(args.prompts))


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt not in (None, "-"):
        text = str(args.prompt)
    elif sys.stdin.isatty():
        raise UsageError("no prompt: give one as an argument or on standard input.")
    else:
        text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise UsageError("the prompt is empty; give it some text.")
    return text


def _load_engine(config: EngineConfig, points: OperatingPoints | None, console: Any) -> Engine:
    """Raises: ConfigError: if the points were measured on something else."""
    from fathom.models.resolve import resolve_model

    resolve_model(config.model)  # a model that is not to be had is told of before torch is loaded
    # Redrawn seldom: the engine times its stages meanwhile.
    with console.status("loading the model", refresh_per_second=2):
        from fathom.engine.engine import Engine

        engine = Engine.from_config(config)
    if points is not None:
        points.check(engine.info)
    return engine


def _stream(
    args: argparse.Namespace, config: EngineConfig, points: OperatingPoints | None, text: str
) -> int:
    from rich.console import Console

    from fathom.commands.terminal import DepthPrinter, summary
    from fathom.models.tokenizer import IncrementalDetokenizer

    notes = Console(stderr=True)
    engine = _load_engine(config, points, notes)
    tokenizer: Any = engine.tokenizer
    chat = not args.raw and tokenizer is not None and bool(tokenizer.hf.chat_template)
    messages = ({"role": "user", "content": text},) if chat else None
    prompt = Prompt("prompt", text=None if chat else text, messages=messages)
    ids = encode_prompt(tokenizer, prompt)
    check_lengths(
        [prompt], [ids], new_tokens=args.new_tokens, max_model_len=engine.info.max_model_len
    )
    printer = DepthPrinter(
        Console(), IncrementalDetokenizer(tokenizer.backend), engine.info.num_layers
    )
    completion = Completion()
    start = time.perf_counter()
    first: float | None = None
    engine.add_request(
        Request(
            request_id="prompt",
            prompt_token_ids=ids,
            sampling=sampling_params(args),
            compute=config.compute,
        )
    )
    try:
        with traced(engine, args.trace, hidden=args.trace_hidden):
            while engine.has_work():
                for output in engine.step():
                    first = first or (time.perf_counter() if output.tokens else None)
                    completion.add(output)
                    printer.show(output.tokens, output.text)
    except KeyboardInterrupt:
        engine.cancel("prompt")
        raise
    finally:
        print(flush=True)
    seconds = time.perf_counter() - start
    if completion.error:
        raise RuntimeError(completion.error)
    if legend := printer.legend():
        notes.print(legend)
    line = summary(
        completion.usage.compute,
        seconds=seconds,
        num_layers=engine.info.num_layers,
        ttft_s=first - start if first else None,
    )
    notes.print(line, style="dim", highlight=False, soft_wrap=True)
    return 0


def _batch(
    args: argparse.Namespace,
    config: EngineConfig,
    points: OperatingPoints | None,
    prompts: Sequence[Prompt],
) -> int:
    results: ResultsFile | None = None
    if args.json is not None:
        job = _job(args, config, prompts)
        results = ResultsFile(args.json, job, len(prompts), resume=args.resume)
        if results.is_complete:
            if not args.json.exists():
                results.finish()
            print(f"{args.json}: all {len(prompts)} results are there", file=sys.stderr)
            return 0
    from rich.console import Console

    from fathom.commands.batch import run_batch

    notes = Console(stderr=True)
    done = results.done if results else {}
    engine = _load_engine(config, points, notes)
    encoded = [encode_prompt(engine.tokenizer, prompt) for prompt in prompts]
    check_lengths(
        prompts, encoded, new_tokens=args.new_tokens, max_model_len=engine.info.max_model_len
    )
    params = sampling_params(args)
    requests = {
        index: Request(
            request_id=str(index),
            prompt_token_ids=ids,
            # Each line its own draws, the same ones whatever else is in the file's batch.
            sampling=params
            if params.seed is None
            else dataclasses.replace(params, seed=params.seed + index),
            compute=config.compute,
        )
        for index, ids in enumerate(encoded)
        if index not in done
    }
    failed = sum(r.get("finish_reason") == FinishReason.ERROR.value for r in done.values())
    with traced(engine, args.trace, hidden=args.trace_hidden):
        failed += run_batch(engine, requests, results, total=len(prompts), notes=notes)
    if failed:
        print(f"fathom: error: {failed} of {len(prompts)} requests failed", file=sys.stderr)
    return 1 if failed else 0


def _job(
    args: argparse.Namespace, config: EngineConfig, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """What the results depend on: the prompts, and every option but those of speed alone."""
    content = json.dumps([(prompt.text, prompt.messages) for prompt in prompts])
    engine = {
        name: getattr(config, name)
        for name in ("model", "dtype", "adapter", "exit_layer", "exit_vocab")
    }
    return {
        "prompts_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "engine": engine,
        "compute": dataclasses.asdict(config.compute),
        "sampling": dataclasses.asdict(sampling_params(args)),
    }
