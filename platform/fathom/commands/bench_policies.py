"""``fathom bench policies``: what budgets, risks and adaptive thresholds hold of their promises."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.calibrate import read
from fathom.commands.options import HelpFormatter, UsageError
from fathom.commands.reports import check_at_least_one, check_output, machine, write_json
from fathom.types import Confidence

if TYPE_CHECKING:
    from fathom.engine.costs import StageCosts
    from fathom.tuning.rows import TraceRows

_EXAMPLES = """\
  fathom bench policies --trace gsm8k.parquet --json policies.json
  fathom bench policies --trace gsm8k.parquet --trace multi30k.parquet --time-steps
"""

_ABOUT = """\
Replays traces that were recorded at full depth (see `fathom calibrate --help`), by the engine's own
policy code. Whole requests are held out.

budget: at eight budgets, what is spent and how often tokens are the full model's, beside requests
at random (static), one tuned threshold (global), MSDNet's shares and tokens at random.
risk: over random splits, how often held-out requests lose more than was promised.
adaptive: λ across a switch from the first trace to the second, what probes are worth where nothing
verifies exits, and replicas that share their counts.
overhead: of a policy, in percent of the cheapest decode step, a draft: mean, and worst token.

"""


def add_parser(targets: Any) -> None:
    """Declare the options."""
    parser = targets.add_parser(
        "policies",
        help="what exit policies hold of their promises, on traces",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--trace", type=Path, action="append", required=True, metavar="FILE",
        help="of one workload; twice: the second is what traffic changes to",
    )  # fmt: skip
    add("--json", type=Path, metavar="OUT", help="write the report here")
    add("--seeds", type=int, default=3, metavar="N", help="splits of the budgets (default: 3)")
    add("--splits", type=int, default=200, metavar="N", help="of the risks (default: 200)")
    add(
        "--confidence",
        choices=[c.value for c in Confidence if c is not Confidence.META],
        default=Confidence.SOFTMAX_GAP.value,
        help="default: softmax_gap",
    )
    add("--exit-temperature", type=float, default=1.0, metavar="T", help="default: 1")
    add(
        "--time-steps", action="store_true",
        help="load the trace's model and time its decode steps here and now, rather than take the "
        "trace's word for them",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Check the options, replay, print the tables, write the JSON."""
    check_at_least_one(args, "seeds", "splits")
    check_output(args.json)
    if len(args.trace) > 2:
        raise UsageError(f"--trace can be given once or twice, got {len(args.trace)}.")
    traces = [read(path) for path in args.trace]
    rows, shifted = traces[0], traces[1] if len(traces) > 1 else None
    if shifted is not None and shifted.source.exit_vocab != rows.source.exit_vocab:
        raise UsageError(f"{args.trace[1]}: is of another exit head than {args.trace[0]}.")

    from rich.console import Console

    from fathom.exits.calibration import TEMPERATURES
    from fathom.tuning.policies_bench import bench
    from fathom.tuning.rows import Measure

    if not TEMPERATURES[0] <= args.exit_temperature <= TEMPERATURES[-1]:
        raise UsageError(
            f"--exit-temperature must be from {TEMPERATURES[0]:g} to {TEMPERATURES[-1]:g}, the "
            f"temperatures of a trace, got {args.exit_temperature}."
        )
    measure = Measure(Confidence(args.confidence), args.exit_temperature)
    notes = Console(stderr=True)
    with notes.status("timing decode steps", refresh_per_second=2) as status:
        costs = _time_steps(rows) if args.time_steps else rows.source.costs
        report = bench(
            rows, shifted, measure, costs=costs, seeds=range(args.seeds), splits=args.splits,
            progress=status.update,
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 130)
    for table in _tables(report):
        console.print(table)
    if args.json is not None:
        write_json(args.json, {"meta": _meta(args, traces), **report})
    return 0


def _time_steps(rows: TraceRows) -> StageCosts:
    """Stage costs of the trace's engine on this machine.

    Raises:
        UsageError: if what can be loaded here is not what the trace is of.
    """
    from fathom.config import EngineConfig
    from fathom.engine.engine import Engine

    own = rows.source
    config = EngineConfig(
        model=own.model, adapter=own.adapter or "none", dtype=own.dtype, exit_layer=own.exit_layer,
        threads=1, quantization=own.quantization,
    )  # fmt: skip
    engine = Engine.from_config(config)
    try:
        theirs = engine.info.weights_digest, engine.info.adapter_digest
        if theirs != (own.weights_digest, own.adapter_digest):
            raise UsageError(
                f"--time-steps: {rows.name} is of model {own.weights_digest} with adapter "
                f"{own.adapter_digest or 'none'}, here are {theirs[0]} and {theirs[1] or 'none'}."
            )
        return engine.stage_costs
    finally:
        engine.close()


def _meta(args: argparse.Namespace, traces: list[TraceRows]) -> dict[str, Any]:
    source = traces[0].source
    return {
        **machine(),
        "model": source.model,
        "weights_digest": source.weights_digest,
        "adapter": source.adapter,
        "adapter_digest": source.adapter_digest,
        "dtype": source.dtype,
        "exit_cost": source.exit_cost,
        "confidence": args.confidence,
        "exit_temperature": args.exit_temperature,
        "seeds": args.seeds,
        "steps_timed": "now" if args.time_steps else "when the trace was recorded",
        "traces": [
            {
                "name": rows.name, "requests": rows.num_requests, "rows": len(rows),
                "agreement": rows.agreement,
            }
            for rows in traces
        ],
    }  # fmt: skip


def _tables(report: dict[str, Any]) -> list[Any]:
    budget = _table("budget: realised / agreement with the full model", list(_BUDGET_COLUMNS))
    for row in report["budget"]:
        ways = [row, *(row["baselines"][name] for name in _BUDGET_COLUMNS[2:])]
        cells = [f"{way['realised']:.3f} / {way['quality']:.1%}" for way in ways]
        budget.add_row(f"{row['target']:g}", *cells)
    risk = _table("risk", ["δ", "bound", "splits", "refused", "violations", "coverage", "oracle's"])
    for row in (*report["risk"], *report["risk_betting"]):
        risk.add_row(
            f"{row['delta']:g}", row["bound"], str(row["splits"]), str(row["refused"]),
            str(row["violations"]), f"{row['coverage']:.1%}", f"{row['oracle_coverage']:.1%}",
        )  # fmt: skip
    tables = [budget, risk]
    adaptive = report["adaptive"]
    if "switches" in adaptive:
        switches = _table(
            "adaptive: switches of workloads (rows until settled: median, most, share in 500)",
            ["from", "to", "fit", "grid", "λ before", "λ after", "oracle's", "settled", "near"],
        )
        for row in adaptive["switches"]:
            for name in ("grid", "fine"):
                own = row[name]
                settled = (
                    f"{'never' if own['settled_after'] is None else own['settled_after']} / "
                    f"{'never' if own['settled_worst'] is None else own['settled_worst']} / "
                    f"{own['settled_in_time']:.0%}"
                )
                switches.add_row(
                    row["from"], row["to"], row["method"], name, f"{own['before']:.3f}",
                    f"{own['after']:.3f}", f"{own['oracle_before']:.3f} {own['oracle_after']:.3f}",
                    settled, f"{own['near']:.1%}",
                )  # fmt: skip
        tables.append(switches)
    probes = _table(
        "adaptive: where nothing verifies exits",
        ["trace", "sees", "fit", "probes", "λ", "oracle's", "off by", "labelled", "exits", "wrong"],
    )
    for row in adaptive["probes"]:
        probes.add_row(
            row["trace"], row["view"], row["method"], f"{row['probe_rate']:g}",
            f"{row['threshold']:.3f}", f"{row['oracle']:.3f}", f"{row['error']:.3f}",
            f"{row['labelled']:.1%}", f"{row['exits']:.1%}", f"{row['risk']:.2%}",
        )  # fmt: skip
    tables.append(probes)
    overhead = _table("overhead", ["policy", "µs a token", "% of a draft step", "at most"])
    for name, percent in report["overhead"]["percent"].items():
        worst = report["overhead"]["worst_percent"][name]
        mean_us = report["overhead"]["policy_us"][name]
        overhead.add_row(name, f"{mean_us:.1f}", f"{percent:.2f}", f"{worst:.2f}")
    return [*tables, overhead]


_BUDGET_COLUMNS = ("target", "live", "static", "global", "msdnet", "random")


def _table(title: str, headings: list[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
