"""``fathom calibrate``: from a trace to confidences that mean something, and to named points."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.options import HelpFormatter, UsageError, add_command
from fathom.commands.reports import check_output, machine, write_json
from fathom.types import Confidence

if TYPE_CHECKING:
    from fathom.tuning.points_fit import Fitted
    from fathom.tuning.report import Report
    from fathom.tuning.rows import TraceRows

_EXAMPLES = """\
  fathom generate --prompts p.jsonl --json a.jsonl --mode free --exit-threshold 1 --trace t.parquet
  fathom calibrate report t.parquet --out report       how far confidences can be trusted
  fathom calibrate fit t.parquet --out points.yaml     operating points, with what they promise
  fathom calibrate meta t.parquet --out meta.safetensors  (a trace with --trace-hidden)

A trace must have the exit head asked at every row, and no row leave: mode free with threshold 1
answers like full depth does, token for token.
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommands and their options."""
    calibrate = add_command(
        commands,
        "calibrate",
        _needs_target,
        about="judge and calibrate confidences from a trace",
        examples=_EXAMPLES,
    )
    targets = calibrate.add_subparsers(metavar="TARGET")
    report = _target(targets, "report", _report, "reliability, coverage and exit depth")
    report.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the diagrams (PNG)"
    )
    report.add_argument("--meta", type=Path, metavar="FILE", help="a meta classifier to judge too")
    report.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    fit = _target(targets, "fit", _fit, "temperature, operating points and certificates")
    fit.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="operating points (YAML)"
    )
    fit.add_argument(
        "--confidence",
        choices=[c.value for c in Confidence if c is not Confidence.META],
        default=Confidence.SOFTMAX_GAP.value,
        help="default: softmax_gap",
    )
    fit.add_argument(
        "--risk",
        type=float,
        action="append",
        metavar="D",
        help="certify this share of tokens that differ (may be repeated; default: 0.02, 0.05, 0.1)",
    )
    fit.add_argument(
        "--epsilon",
        type=float,
        default=0.1,
        metavar="E",
        help="probability with which a promise may fail (default: 0.1)",
    )
    fit.add_argument(
        "--bound",
        choices=("hoeffding_bentkus", "betting"),
        default="hoeffding_bentkus",
        help="how risks are certified; betting lets more tokens exit (default: hoeffding_bentkus)",
    )
    fit.add_argument(
        "--balanced-risk", type=float, default=0.05, metavar="D", help="of balanced (default: 0.05)"
    )
    fit.add_argument(
        "--fast-agreement", type=float, default=0.9, metavar="A", help="of fast (default: 0.9)"
    )
    meta = _target(targets, "meta", _meta, "train the confidence `meta`")
    meta.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the classifier (safetensors)"
    )
    for parser in (report, fit, meta):
        parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")


def _target(targets: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = targets.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".",
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("trace", type=Path, metavar="TRACE", help="as --trace writes it")
    return parser


def _needs_target(args: argparse.Namespace) -> int:
    raise UsageError("say what to do: fathom calibrate report, fit or meta (--help shows more).")


def read(path: Path) -> TraceRows:
    """Read a trace for calibration, and say so if it is of another kind.

    Raises:
        UsageError: for a file that is no such trace; or one whose rows left early, which then
            follow the exit's own answers and are chosen by its threshold.
    """
    from fathom.tuning.rows import read_rows

    try:
        rows = read_rows(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if left := int(rows.exited.sum()):
        raise UsageError(
            f"{path}: {left} of {len(rows)} rows left at the exit when it was recorded: "
            "calibration needs rows that no threshold has chosen. Record with --mode free "
            "--exit-threshold 1."
        )
    return rows


def _report(args: argparse.Namespace) -> int:
    check_output(args.json)
    check_output(args.out)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "the diagrams are drawn with matplotlib, which is not installed: "
            "python -m pip install 'fathom-serve[train]'."
        )
    rows = read(args.trace)
    from rich.console import Console

    from fathom.exits.meta import MetaClassifier
    from fathom.tuning.report import as_json, draw, make_report

    meta = None if args.meta is None else MetaClassifier.load(args.meta, rows.source.weights_digest)
    try:
        report = make_report(rows, seed=args.seed, meta=meta)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console = Console()
    console.width = max(console.width, 110)
    console.print(_report_table(report, rows))
    args.out.mkdir(exist_ok=True)
    for path in draw(report, rows, args.out):
        console.print(str(path), highlight=False)
    if args.json is not None:
        write_json(args.json, {"meta": {**machine(), "trace": rows.name}, **as_json(report)})
    return 0


def _report_table(report: Report, rows: TraceRows) -> Any:
    from rich.table import Table

    found = report.temperature
    table = Table(
        title=f"{rows.name}: {report.requests} held-out requests, {report.rows} rows, agreement "
        f"{report.agreement:.1%}; temperature {found.temperature:.3f} (loss {found.before:.4f} -> "
        f"{found.loss:.4f} nats)",
        title_justify="left",
    )
    table.add_column("confidence")
    for heading in ("T", "ECE", "mean - agreement", "AUROC"):
        table.add_column(heading, justify="right")
    for precision in report.measures[0].coverage:
        table.add_column(f"coverage at {precision:.0%}", justify="right")
    for each in report.measures:
        table.add_row(
            each.confidence.value, f"{each.temperature:.3f}", f"{each.reliability.ece:.4f}",
            f"{each.reliability.overconfidence:+.4f}", f"{each.auroc:.4f}",
            *(f"{share:.1%}" for share in each.coverage.values()),
        )  # fmt: skip
    return table


def _fit(args: argparse.Namespace) -> int:
    check_output(args.out)
    risks = tuple(args.risk or (0.02, 0.05, 0.1))
    for option, values in (
        ("--risk", risks),
        ("--epsilon", (args.epsilon,)),
        ("--balanced-risk", (args.balanced_risk,)),
        ("--fast-agreement", (args.fast_agreement,)),
    ):
        for value in values:
            if not 0 < value < 1:
                raise UsageError(f"{option} must be between 0 and 1, got {value}.")
    rows = read(args.trace)
    from rich.console import Console

    from fathom.exits.p_values import Bound
    from fathom.tuning.points_fit import fit_points

    try:
        fitted = fit_points(
            rows, args.trace, confidence=Confidence(args.confidence), risks=risks,
            epsilon=args.epsilon, bound=Bound(args.bound), balanced_risk=args.balanced_risk,
            fast_agreement=args.fast_agreement, seed=args.seed,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error
    fitted.points.save(args.out)
    console = Console()
    console.width = max(console.width, 110)
    for table in _fit_tables(fitted):
        console.print(table)
    for why in fitted.refused.values():
        console.print(why, highlight=False, soft_wrap=True)
    console.print(str(args.out), highlight=False)
    return 0


def _fit_tables(fitted: Fitted) -> list[Any]:
    from rich.table import Table

    points = Table(title="points, on held-out requests", title_justify="left")
    for heading in ("point", "mode", "policy", "λ"):
        points.add_column(heading)
    for heading in ("agreement", "exits", "cost", "predicted speed-up"):
        points.add_column(heading, justify="right")
    for name, point in fitted.points.points.items():
        own, compute = point.measured, point.compute
        points.add_row(
            name, compute.mode.value, compute.policy.value, f"{compute.threshold:.3f}",
            f"{own['agreement']:.2%}", f"{own['exit_rate']:.1%}", f"{own['budget']:.3f}",
            f"{own['predicted_speedup']:.2f}",
        )  # fmt: skip
    certificates = Table(title="certificates", title_justify="left")
    for heading in ("risk", "with confidence", "λ", "requests", "mean loss", "exits"):
        certificates.add_column(heading, justify="right")
    for each in fitted.certificates:
        certificates.add_row(
            f"{each.delta:g}", f"{1 - each.epsilon:g}", f"{each.threshold:.4f}", str(each.n),
            f"{each.risk_hat:.4f}", f"{each.coverage:.1%}",
        )  # fmt: skip
    return [points, certificates]


def _meta(args: argparse.Namespace) -> int:
    check_output(args.out)
    rows = read(args.trace)
    if rows.hidden is None:
        raise UsageError(
            f"{args.trace}: has no exit states, which the classifier reads: record it again with "
            "--trace-hidden."
        )
    import torch
    from rich.console import Console
    from rich.table import Table

    from fathom.exits.meta import fit
    from fathom.tuning.report import judge, meta_confidence

    train, held_out = rows.halves(args.seed, 0.7)
    assert train.hidden is not None
    with Console(stderr=True).status("training", refresh_per_second=2):
        model = fit(
            torch.from_numpy(train.hidden.copy()),
            torch.from_numpy(train.agrees),
            torch.from_numpy(train.groups),
            seed=args.seed,
        )
    source = rows.source
    model.save(
        args.out, source.weights_digest,
        {"adapter_digest": source.adapter_digest, "trace": rows.name},
    )  # fmt: skip
    table = Table(title=f"{held_out.num_requests} held-out requests", title_justify="left")
    for heading in ("confidence", "ECE", "AUROC", "coverage at 90%", "at 95%", "at 98%"):
        table.add_column(heading, justify="left" if heading == "confidence" else "right")
    for measure, values in (
        (Confidence.SOFTMAX_GAP, held_out.gap),
        (Confidence.MAX_PROB, held_out.max_prob),
        (Confidence.META, meta_confidence(held_out, model)),
    ):
        found = judge(measure, 1.0, values, held_out.agrees)
        table.add_row(
            measure.value, f"{found.reliability.ece:.4f}", f"{found.auroc:.4f}",
            *(f"{share:.1%}" for share in found.coverage.values()),
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{args.out}: trained on {len(train)} rows", highlight=False)
    return 0
