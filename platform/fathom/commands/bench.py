"""``fathom bench``: what can be measured, one module a target."""

from __future__ import annotations

import argparse
from typing import Any

from fathom.commands import (
    bench_cluster,
    bench_engine,
    bench_peers,
    bench_policies,
    bench_serve,
)
from fathom.commands.options import UsageError, add_command

_EXAMPLES = """\
  fathom bench engine --modes full,exact,free --batch 1,8     tokens/s, latency and depth
  fathom bench peers --threads 1 --runs 3                     beside transformers, vLLM, llama.cpp
  fathom bench serve --request-rate 4 --goodput ttft:500      latency and throughput of a server
  fathom bench cluster --modes full,exact --json cluster.json  fused beside disaggregated
  fathom bench policies --trace drafts.parquet                what exit policies promise and hold
"""


def add_parser(commands: Any) -> None:
    """Declare the targets and their options."""
    bench = add_command(
        commands,
        "bench",
        _needs_target,
        about="measure an engine, a cluster or exit policies",
        examples=_EXAMPLES,
    )
    targets = bench.add_subparsers(metavar="TARGET")
    for module in (bench_engine, bench_peers, bench_serve, bench_cluster, bench_policies):
        module.add_parser(targets)


def _needs_target(args: argparse.Namespace) -> int:
    raise UsageError(
        "say what to benchmark: fathom bench engine, peers, serve, cluster or policies (--help "
        "shows the options)."
    )
