"""``fathom bench serve``: load on an OpenAI-compatible server, at a rate or at a concurrency."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from fathom.commands.options import HelpFormatter
from fathom.commands.prompts import read_prompts
from fathom.commands.reports import check_output, machine, write_json
from fathom.commands.serve_load import (
    check_load_options,
    extra_body,
    first_model,
    limits,
    offered_loads,
    percentile_list,
    print_rows,
    run_one,
)

_EXAMPLES = """\
  fathom bench serve --request-rate 4 --num-prompts 200 --goodput ttft:500,tpot:50
  fathom bench serve --max-concurrency 8 --input-len 128 --output-len 128 --json serve.json
  fathom bench serve --sweep 1,2,4,8 --goodput ttft:500 --plot sweep.png
  fathom bench serve --sweep 1,2,4,8 --sweep-over max-concurrency --prompts prompts.jsonl
  fathom bench serve --base-url http://host:8000 --endpoint /v1/completions --vocab-size 49152
"""

_ABOUT = """\
Streams requests from any server that speaks OpenAI's protocol. Open loop (--request-rate): requests
leave at their times, whatever became of those before. Closed loop (--max-concurrency): so many
users, each of whom waits for an answer. Options and figures are those of `vllm bench serve` where
it has them.

TTFT: to the first chunk. TPOT: time after it, a token. ITL: between chunks (several tokens may
travel in one). E2EL: to the last chunk. A request that fails is counted by the kind of failure, and
in no latency. Tokens are counted by the server (`usage`), else as chunks, which the report says.
client: how late the generator itself was, and its share of a core: above some ms, or near 100%, it
measures itself. A server needs no more than the endpoint; usage.compute is shown where it comes.

"""


def add_parser(targets: Any) -> None:
    """Declare the options."""
    parser = targets.add_parser(
        "serve",
        help="latency and throughput of a server under load",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    server = parser.add_argument_group("server").add_argument
    server(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL",
        help="without /v1 (default: http://127.0.0.1:8000)",
    )  # fmt: skip
    server(
        "--endpoint", default="/v1/chat/completions", metavar="PATH",
        help="or /v1/completions (default: /v1/chat/completions)",
    )  # fmt: skip
    server("--model", metavar="NAME", help="default: the first that the server lists")
    server("--api-key", metavar="KEY", help="default: OPENAI_API_KEY, else FATHOM_API_KEY")
    server("--timeout", type=float, default=600, metavar="S", help="silence (default: 600 s)")
    load = parser.add_argument_group("load").add_argument
    load("--num-prompts", type=int, default=100, metavar="N", help="requests (default: 100)")
    load(
        "--request-rate", type=float, default=math.inf, metavar="R",
        help="requests a second (default: inf, all at once)",
    )  # fmt: skip
    load(
        "--burstiness", type=float, default=1.0, metavar="B",
        help="shape of the gamma distribution of intervals: 1 is Poisson (default), less is "
        "burstier, more is evener",
    )  # fmt: skip
    load("--max-concurrency", type=int, metavar="N", help="requests at once (default: any)")
    load(
        "--sweep", metavar="LIST",
        help="several rates in turn, or concurrencies, see --sweep-over; a row for each",
    )  # fmt: skip
    load(
        "--sweep-over", choices=("request-rate", "max-concurrency"), default="request-rate",
        help="default: request-rate",
    )  # fmt: skip
    load("--num-warmups", type=int, default=1, metavar="N", help="not counted (default: 1)")
    load("--seed", type=int, default=0, metavar="N", help="of times and prompts (default: 0)")
    text = parser.add_argument_group("requests").add_argument
    text("--input-len", "--random-input-len", type=int, default=128, metavar="N",
         help="words of a random prompt (default: 128)")  # fmt: skip
    text("--output-len", "--random-output-len", type=int, default=128, metavar="N",
         help="tokens of an answer (default: 128)")  # fmt: skip
    text(
        "--vocab-size", type=int, metavar="N",
        help="draw token ids below N rather than words; --endpoint /v1/completions",
    )  # fmt: skip
    text("--prompts", type=Path, metavar="FILE", help="JSON lines, as for generate; repeated")
    text(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="ask for answers of exactly --output-len (default: yes; OpenAI's own servers refuse)",
    )  # fmt: skip
    text("--extra-body", metavar="JSON", help='fields to add, as {"compute": {"mode": "free"}}')
    report = parser.add_argument_group("report").add_argument
    report(
        "--goodput", "--slo", nargs="+", metavar="KEY:MS",
        help="limits of ttft, tpot, e2el in ms; what keeps them is the goodput",
    )  # fmt: skip
    report(
        "--metric-percentiles", default="50,90,95,99", metavar="LIST", help="default: 50,90,95,99"
    )
    report("--json", type=Path, metavar="OUT", help="write meta and rows here")
    report("--plot", type=Path, metavar="PNG", help="draw the sweep (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Check the options, load the server, print the table, write JSON and plot."""
    check_load_options(args)
    slo, offered = limits(args.goodput), offered_loads(args)
    check_output(args.json)
    check_output(args.plot)
    percentiles, extra = percentile_list(args.metric_percentiles), extra_body(args.extra_body)
    prompts = None if args.prompts is None else read_prompts(args.prompts)

    from rich.console import Console

    from fathom.bench.load_run import Target
    from fathom.bench.serve_figures import load_row

    key = args.api_key or os.environ.get("OPENAI_API_KEY") or _fathom_key()
    base = args.base_url.rstrip("/").removesuffix("/v1")
    target = Target(base, args.endpoint, key, timeout_s=args.timeout)
    model = args.model or first_model(target)
    by_rate = args.sweep_over == "request-rate"
    notes, interrupted = Console(stderr=True), False
    rows: list[dict[str, Any]] = []
    try:
        for number, (rate, concurrency) in enumerate(offered):
            load = run_one(
                args, target, model, prompts, extra, (rate, concurrency), number, notes
            )  # fmt: skip
            row: dict[str, Any] = {
                "request_rate": None if math.isinf(rate) else rate,
                "burstiness": args.burstiness,
                "max_concurrency": concurrency,
                "load": (rate if by_rate else concurrency) if args.sweep else None,
                "slo_ms": slo,
            }
            rows.append(row | load_row(load, slo_ms=slo, percentiles=percentiles))
    except KeyboardInterrupt:
        interrupted = True  # the loads that came to their end are still shown and written
    if rows:
        print_rows(rows, f"{model} at {base}{args.endpoint}")
        if args.plot is not None:
            from fathom.bench.serve_plot import plot_sweep

            unit = "requests/s" if by_rate else "requests at once"
            notes.print(f"wrote {plot_sweep(rows, args.plot, unit=unit, title=model)}")
    if args.json is not None:
        meta = {**machine(), "base_url": base, "endpoint": args.endpoint, "model": model,
                "seed": args.seed, "ignore_eos": args.ignore_eos, "input_len": args.input_len,
                "output_len": args.output_len, "vocab_size": args.vocab_size,
                "prompts": args.prompts.name if args.prompts else "random", "extra_body": extra,
                "interrupted": interrupted}  # fmt: skip
        write_json(args.json, {"meta": meta, "rows": rows})
    if interrupted:
        raise KeyboardInterrupt
    if rows and not any(row["completed"] for row in rows):
        raise RuntimeError(f"no request was completed: {rows[0]['error_samples']}")
    return 0


def _fathom_key() -> str:
    """The first key of a server that was started in the same shell."""
    return os.environ.get("FATHOM_API_KEY", "").split(",")[0].strip()
