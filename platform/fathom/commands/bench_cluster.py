"""``fathom bench cluster``: fused beside disaggregated, the way of a flush, a shared prefix."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fathom.commands.options import (
    HelpFormatter,
    UsageError,
    add_compute_options,
    add_engine_options,
    compute_policy,
    engine_values,
)
from fathom.commands.reports import check_at_least_one, check_output, machine, mode_list, write_json
from fathom.config import EngineConfig
from fathom.types import AcceptMode

_EXAMPLES = """\
  fathom bench cluster --modes full,exact --json cluster.json
  fathom bench cluster --parts exchange --dtype float32
  fathom bench cluster --parts prefix --prefix-tokens 2000 --runs 3
"""

_ABOUT = """\
Three measurements on this machine, each run several times, medians told.

throughput: two servers side by side, one loaded at a time: fused (two replicas of one core) and
  disaggregated (a shallow and a deep replica of one core each). Same requests at --concurrency,
  run i of both before run i + 1 of either. ratio is disaggregated over fused, by rounds. Over
  HTTP: the client, the ingress and Ray run on the same cores.
exchange: a shallow stage here and a deep stage in a process of its own; --sequences at once. Per
  flush of all of them, the time from sending it to its answer, less the deep pass.
prefix: two engines in processes of their own over one KV store. A prompt of --prefix-tokens is
  computed on one, then asked of the other; TTFT there over TTFT here.

"""

PARTS = ("exchange", "prefix", "throughput")
Report = dict[str, Any]


def add_parser(targets: Any) -> None:
    """Declare the options."""
    parser = targets.add_parser(
        "cluster",
        help="tokens/s of both topologies, time of a flush, TTFT behind a shared prefix",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="LIST", help="default: all")
    parser.add_argument(
        "--modes",
        default="exact,full",
        metavar="LIST",
        help="the first one's figures stand at the top of the report (default: exact,full)",
    )
    for option, value, about in (
        ("concurrency", 16, "requests under way at once"),
        ("requests", 32, "of a throughput run"),
        ("new-tokens", 64, "of each request"),
        ("sequences", 8, "of a flush"),
        ("prefix-tokens", 1000, "of the shared prefix"),
        ("runs", 5, "of everything"),
    ):
        parser.add_argument(
            f"--{option}", type=int, default=value, metavar="N", help=f"{about} (default: {value})"
        )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here")
    add_compute_options(parser, mode=False)
    add_engine_options(parser, threads=False)


def run(args: argparse.Namespace) -> int:
    """Check the options, measure, print, write the JSON."""
    modes = mode_list(args.modes)
    counts = ("concurrency", "requests", "new_tokens", "sequences", "prefix_tokens", "runs")
    check_at_least_one(args, *counts)
    check_output(args.json)
    parts = [part.strip() for part in args.parts.split(",")]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UsageError(f"--parts must be a list of {', '.join(PARTS)}, got {unknown[0]!r}.")
    values = {"max_num_seqs": max(args.concurrency, args.sequences), **engine_values(args)}
    config = EngineConfig(compute=compute_policy(args), threads=1, **values)
    config.validate()

    from rich.console import Console

    from fathom.models.resolve import resolve_model

    resolve_model(config.model)  # before the seconds that everything else takes
    notes = Console(stderr=True)
    report: Report = {
        "meta": {
            **machine(),
            "model": config.model,
            "engine": dataclasses.asdict(config),
            **{name: getattr(args, name) for name in counts},
            "modes": [mode.value for mode in modes],
            "interrupted": False,
        }
    }
    measures: dict[str, Callable[..., Iterator[str]]] = {
        "exchange": _exchange,
        "prefix": _prefix,
        "throughput": _throughput,
    }
    try:
        with notes.status("starting", refresh_per_second=2) as status:
            for part in PARTS:  # the quiet ones first
                if part not in parts:
                    continue
                status.update(f"{part}: starting")
                for news in measures[part](args, config, modes, report):
                    status.update(f"{part}: {news}")
    except KeyboardInterrupt:
        report["meta"]["interrupted"] = True  # what was measured until now is shown and written
    _show(report)
    if args.json is not None:
        write_json(args.json, report)
    if report["meta"]["interrupted"]:
        raise KeyboardInterrupt
    return 0


def _exchange(
    args: argparse.Namespace, config: EngineConfig, modes: list[AcceptMode], report: Report
) -> Iterator[str]:
    from fathom.bench.exchange import measure_exchange
    from fathom.bench.prompts import QUESTIONS
    from fathom.models.resolve import resolve_model
    from fathom.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(config.model))
    prompts = [
        tuple(tokenizer.encode(QUESTIONS[i % len(QUESTIONS)])) for i in range(args.sequences)
    ]
    for mode in modes:
        compute = dataclasses.replace(config.compute, mode=mode)
        found = []
        for each in measure_exchange(
            config, compute, prompts, new_tokens=args.new_tokens, runs=args.runs
        ):
            found.append(each)
            yield f"{mode} {each.overhead_ms:.2f} ms beside passes of {each.pass_ms:.1f} ms"
            figures = {
                **_figures([run.overhead_ms for run in found]),
                "sequences": args.sequences,
                "pass_ms": [run.pass_ms for run in found],
                "rows": [run.rows for run in found],
                "flushes": [run.flushes for run in found],
            }
            _enter(report, modes, mode, flush_overhead_ms_p50=figures)


def _prefix(
    args: argparse.Namespace, config: EngineConfig, modes: list[AcceptMode], report: Report
) -> Iterator[str]:
    from deployments.pair import engine_pair
    from fathom.bench.prefix import measure_prefix

    found = []
    with engine_pair(config) as pair:
        for each in measure_prefix(
            pair.replicas,
            pair.blocks_taken,
            prefix_tokens=args.prefix_tokens,
            vocab_size=pair.vocab_size,
            runs=args.runs,
        ):
            found.append(each)
            yield f"{each.warm_s * 1e3:.0f} ms in place of {each.cold_s * 1e3:.0f} ms"
            report["prefix_ttft_ratio"] = {
                **_figures([run.ratio for run in found]),
                "prefix_tokens": args.prefix_tokens,
                "cold_ms": [run.cold_s * 1e3 for run in found],
                "warm_ms": [run.warm_s * 1e3 for run in found],
            }


def _throughput(
    args: argparse.Namespace, config: EngineConfig, modes: list[AcceptMode], report: Report
) -> Iterator[str]:
    from fathom.bench.measure import median_ratio
    from fathom.bench.throughput import measure_servers
    from fathom.commands.servers import both_topologies
    from fathom.drills.client import StreamClient

    rates: dict[tuple[str, AcceptMode], list[float]] = {}
    ttfts: dict[tuple[str, AcceptMode], list[float | None]] = {}
    with both_topologies(config) as urls:
        clients = {name: StreamClient(url, tries=1) for name, url in urls.items()}
        for name, mode_name, each in measure_servers(
            clients,
            model=config.model,
            modes=[mode.value for mode in modes],
            requests=args.requests,
            concurrency=args.concurrency,
            new_tokens=args.new_tokens,
            runs=args.runs,
        ):
            mode = AcceptMode(mode_name)
            own = rates.setdefault((name, mode), [])
            own.append(each.tokens_per_s)
            firsts = ttfts.setdefault((name, mode), [])
            firsts.append(each.ttft_ms_p50)
            yield f"{name} {mode} {each.tokens_per_s:.1f} tokens/s"
            figures = {**_figures(own), "ttft_ms_p50": firsts}
            _enter(report, modes, mode, **{f"{name}_tokens_per_s": figures})
            fused = rates.get(("fused", mode), [])
            ratio = median_ratio(rates.get(("disaggregated", mode), []), fused)
            _enter(report, modes, mode, ratio=ratio)


def _figures(runs: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(runs), "runs": [round(value, 4) for value in runs]}


def _enter(report: Report, modes: list[AcceptMode], mode: AcceptMode, **figures: Any) -> None:
    """Note a mode's figures; those of the first mode stand at the top as well."""
    report.setdefault("modes", {}).setdefault(mode.value, {}).update(figures)
    if mode is modes[0]:
        report.update(figures)


def _show(report: Report) -> None:
    """A line a figure."""
    for mode, figures in report.get("modes", {}).items():
        for name, value in figures.items():
            median = value["median"] if isinstance(value, dict) else value
            if median is not None:
                print(f"{mode:<9} {name:<28} {median:.3f}")
    prefix = report.get("prefix_ttft_ratio")
    if prefix is not None:
        print(f"{'':<9} {'prefix_ttft_ratio':<28} {prefix['median']:.3f}")
