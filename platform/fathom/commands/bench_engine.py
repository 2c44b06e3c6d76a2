"""``fathom bench engine``: modes and peers measured in turn, beside the ideal speed-up."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.options import (
    HelpFormatter,
    UsageError,
    add_compute_options,
    add_engine_options,
    compute_policy,
    engine_values,
)
from fathom.commands.prompts import Prompt, check_lengths, encode_prompt, read_prompts
from fathom.commands.reports import (
    batch_list,
    check_at_least_one,
    check_output,
    machine,
    mode_list,
    write_json,
)
from fathom.commands.tracing import add_trace_option, check_trace, traced
from fathom.config import EngineConfig
from fathom.types import AcceptMode, ComputePolicy

if TYPE_CHECKING:
    from fathom.bench.measure import Contender, Prompts
    from fathom.engine.engine import Engine

_EXAMPLES = """\
  fathom bench engine --modes full,exact,rollback,free --batch 1,8 --new-tokens 64
  fathom bench engine --modes full --batch 1,8 --vs transformers --dtype float32 --threads 1
  fathom bench engine --modes full,free --forced-exit-rate 0.75 --max-stack 8 --json out.json
"""

_TABLE_WIDTH = 168

_ABOUT = """\
Every contender generates exactly --new-tokens tokens (greedy, end of text ignored) for the same
prompts, --batch of them at once; run i of all comes before run i + 1 of any. Prefix caching is
off. full and exact are lossless, rollback and free are lossy.

tokens/s: all tokens over wall-clock time, prefill included; the median of the runs.
x full: the median over rounds of this contender's rate over that of full in the same round.
ideal: the speed-up that follows from the measured stage costs and the run's own exit rate.
of copy: bytes of weights, keys and values that decoding in full touches a second, over those that a
plain copy in memory reads and writes before and after the runs.

"""


def add_parser(targets: Any) -> None:
    """Declare the options."""
    parser = targets.add_parser(
        "engine",
        help="tokens/s, latency and depth of the engine",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--modes", default="full,exact,rollback,free", metavar="LIST", help="default: all four"
    )
    parser.add_argument("--batch", default="1,8", metavar="LIST", help="sequences (default: 1,8)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON lines, as for generate")
    parser.add_argument(
        "--num-prompts",
        type=int,
        metavar="N",
        help="use the first N prompts (default: as many as the largest batch)",
    )
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--vs", choices=("transformers",), help="a peer to measure beside it")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write meta and rows here")
    add_trace_option(parser)
    add_compute_options(parser, mode=False)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check the options, measure, print the table, write the JSON."""
    modes, batches = mode_list(args.modes), batch_list(args.batch)
    check_at_least_one(args, "new_tokens", "runs")
    check_trace(args)
    policy = compute_policy(args)
    values = {"max_num_seqs": max(batches), **engine_values(args)}
    config = EngineConfig(compute=policy, prefix_caching=False, **values)
    config.validate()
    if config.max_num_seqs < max(batches):
        raise UsageError(f"--max-num-seqs must be at least the largest batch ({max(batches)}).")
    check_output(args.json)
    prompts = _prompts(args, max(batches))

    from rich.console import Console

    from fathom.models.resolve import resolve_model

    resolve_model(config.model)  # before the seconds that torch takes to load
    from fathom.engine.engine import Engine

    notes = Console(stderr=True)
    with notes.status("loading the model and measuring its stages", refresh_per_second=2):
        engine = Engine.from_config(config)
        encoded = [encode_prompt(engine.tokenizer, prompt) for prompt in prompts]
        check_lengths(
            prompts, encoded, new_tokens=args.new_tokens, max_model_len=engine.info.max_model_len
        )
        contenders = _contenders(args, engine, modes, policy)
    return _measure(args, engine, contenders, encoded, batches, notes)


def _prompts(args: argparse.Namespace, largest: int) -> list[Prompt]:
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    else:
        from fathom.bench.prompts import QUESTIONS

        prompts = [
            Prompt(f"built-in prompt {i}", messages=({"role": "user", "content": question},))
            for i, question in enumerate(QUESTIONS, 1)
        ]
    wanted = largest if args.num_prompts is None else args.num_prompts
    if wanted < 1:
        raise UsageError(f"--num-prompts must be at least 1, got {wanted}.")
    return prompts[:wanted]


def _contenders(
    args: argparse.Namespace, engine: Engine, modes: Sequence[AcceptMode], policy: ComputePolicy
) -> list[Contender]:
    from fathom.bench.measure import FathomContender

    found: list[Contender] = [
        FathomContender(engine, dataclasses.replace(policy, mode=mode)) for mode in modes
    ]
    if args.vs == "transformers":
        from fathom.bench.transformers_peer import TransformersContender
        from fathom.models.resolve import resolve_model

        eos = engine.info.eos_token_ids
        found.append(
            TransformersContender(
                resolve_model(engine.info.model), engine.info.dtype, eos[0] if eos else 0
            )
        )
    return found


def _measure(
    args: argparse.Namespace,
    engine: Engine,
    contenders: Sequence[Contender],
    prompts: Prompts,
    batches: Sequence[int],
    notes: Any,
) -> int:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from fathom.bench.differences import explain_differences
    from fathom.bench.measure import Run, run_interleaved
    from fathom.bench.report import Key, build_rows, build_table, key_of
    from fathom.bench.roofline import copy_bandwidth, fill_in
    from fathom.models.bits import Bits

    meta = _meta(args, engine, len(prompts))
    device = str(engine_values(args).get("device", EngineConfig.device))
    copied = copy_bandwidth(device)
    results: dict[Key, list[Run]] = {}
    interrupted = False
    try:
        with Progress(console=notes, auto_refresh=False) as bar:
            task = bar.add_task("warm-up", total=args.runs * len(batches) * len(contenders))
            for contender, batch, result in run_interleaved(
                contenders, prompts, batches, new_tokens=args.new_tokens, runs=args.runs
            ):
                results.setdefault(key_of(contender, batch), []).append(result)
                rate = f"{contender.engine} {contender.mode} x{batch} {result.tokens_per_s:.1f}/s"
                bar.update(task, advance=1, description=rate, refresh=True)
    except KeyboardInterrupt:
        interrupted = True  # what was measured until now is still shown and written
    rows = build_rows(
        contenders,
        batches,
        results,
        costs=engine.stage_costs,
        dtype=engine.info.dtype,
        threads=torch.get_num_threads(),
    )
    copied = (copied + copy_bandwidth(device)) / 2
    meta["copy_bytes_per_s"] = copied
    mean_prompt = sum(map(len, prompts)) / len(prompts)
    fill_in(
        rows,
        engine.ledger.costs,
        Bits.parse(engine.info.quantization),
        getattr(torch, engine.info.dtype).itemsize,
        context=mean_prompt + args.new_tokens / 2,
        copied=copied,
    )
    for row in rows:
        exact, full = (
            results.get((row["engine"], mode, row["batch"])) for mode in ("exact", "full")
        )
        if row["mode"] == "exact" and exact and full and not interrupted:
            row["differences"] = explain_differences(
                engine, prompts, exact[-1].token_ids, full[-1].token_ids
            )
    if args.trace is not None and not interrupted:
        with traced(
            engine, args.trace, hidden=args.trace_hidden
        ):  # a pass of its own: tracing takes time
            for contender in contenders:
                if contender.engine == "fathom":
                    contender.run(prompts, max(batches), args.new_tokens)
    meta["interrupted"] = interrupted
    if rows:
        title = f"{engine.info.model}, {engine.info.dtype}, {meta['threads']} threads"
        # A table that loses columns to a narrow terminal loses its sense: let it wrap instead.
        console = Console()
        console.width = max(console.width, _TABLE_WIDTH)
        console.print(build_table(rows, title))
    if args.json is not None:
        write_json(args.json, {"meta": meta, "rows": rows})
    if interrupted:
        raise KeyboardInterrupt
    return 0


def _meta(args: argparse.Namespace, engine: Engine, num_prompts: int) -> dict[str, Any]:
    """What is needed to read the rows and to measure them again."""
    import torch

    info, costs = engine.info, engine.stage_costs
    curves = {name: getattr(costs, name) for name in ("shallow", "shallow_full", "deep")}
    own = machine()
    own["versions"]["transformers"] = importlib.metadata.version("transformers")
    return {
        **own,
        "model": info.model,
        "weights_digest": info.weights_digest,
        "num_layers": info.num_layers,
        "adapter": info.adapter,
        "exit_layer": info.exit_layer,
        "exit_depth": info.exit_depth,
        "exit_vocab": info.exit_vocab,
        "dtype": info.dtype,
        "attention": info.attention,
        "threads": torch.get_num_threads(),
        "prompts": str(args.prompts.name) if args.prompts else "built-in",
        "num_prompts": num_prompts,
        "new_tokens": args.new_tokens,
        "runs": args.runs,
        "compute": {**dataclasses.asdict(compute_policy(args)), "mode": None},
        "stage_costs_ms": {
            name: {str(rows): seconds * 1e3 for rows, seconds in curve.as_dict().items()}
            for name, curve in curves.items()
        },
    }
