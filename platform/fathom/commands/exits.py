"""``fathom exits show``: what a server's exit policies have seen, and what they do now."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fathom.commands.asking import DEFAULT_URL, ask
from fathom.commands.options import HelpFormatter, UsageError, add_command
from fathom.commands.shadow_table import shadow_table, shadow_words

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40

_EXAMPLES = """\
  fathom exits show                              of the server at http://127.0.0.1:8000
  fathom exits show --url http://10.0.0.5:9000   of another; FATHOM_API_KEY holds its key
  fathom exits show --json | jq .merged          everything, as GET /v1/exits gives it
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its options."""
    exits = add_command(
        commands,
        "exits",
        _needs_target,
        about="show what a server's exit policies have seen",
        examples=_EXAMPLES,
    )
    targets = exits.add_subparsers(metavar="TARGET")
    about = "thresholds, densities and promises of all replicas together, and λ over time"
    show = targets.add_parser(
        "show",
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    show.add_argument("--url", default=DEFAULT_URL, help=f"of the server (default: {DEFAULT_URL})")
    show.add_argument("--json", action="store_true", help="print the server's answer as it is")
    show.set_defaults(run=run)


def _needs_target(args: argparse.Namespace) -> int:
    raise UsageError("say what to do: fathom exits show.")


def run(args: argparse.Namespace) -> int:
    """Ask the server, and print."""
    body = ask(args.url, "/v1/exits")
    if args.json:
        print(json.dumps(body, ensure_ascii=False, indent=2))
        return 0
    from rich.console import Console

    show(body, Console())
    return 0


def show(body: Mapping[str, Any], console: Any) -> None:
    """Print the answer of ``/v1/exits`` as tables.

    Args:
        console: rich's.
    """
    together = body["merged"]
    if not together["measures"]:
        console.print(
            f"{len(body['replicas'])} replicas, and no draft seen yet: exit policies learn from "
            "requests that draft (mode free, rollback, exact or copy)."
        )
    else:
        console.print(_measures_table(together["measures"]))
        console.print(_history_table(together["measures"]))
    if together["promises"]:
        console.print(_promises_table(together["promises"]))
    console.print(_replicas_table(body["replicas"]))
    if body.get("shadow") is not None:  # servers of before know of none
        console.print(shadow_table(body["shadow"]))
        for line in shadow_words(body["shadow"]):
            console.print(line)


def _measures_table(measures: Mapping[str, Any]) -> Any:
    table = _table(
        "All replicas together",
        "confidence",
        "λ adaptive",
        "agree",
        "disagree",
        "unlabelled",
        "Beta of those that agree",
        "of those that disagree",
        "share that agrees",
    )
    for name, measure in measures.items():
        rows, mixture = measure["rows"], measure["mixture"]
        fitted = not mixture["fallback"]
        table.add_row(
            name,
            f"{measure['adaptive_threshold']:.3f}",
            *(f"{rows[kind]:,}" for kind in ("agrees", "disagrees", "unlabelled")),
            _beta(mixture["agrees"]) if fitted else "-",
            _beta(mixture["disagrees"]) if fitted else "-",
            f"{mixture['weight']:.1%}" if fitted else mixture["fallback"],
        )
    return table


def _history_table(measures: Mapping[str, Any]) -> Any:
    table = _table("λ over time", "confidence", "rows", "λ, first to latest", "least", "most")
    for name, measure in measures.items():
        history = measure["history"]
        if history:
            values = [value for _, value in history]
            table.add_row(
                name,
                f"{history[0][0]:,} to {history[-1][0]:,}",
                sparkline(values),
                f"{min(values):.3f}",
                f"{max(values):.3f}",
            )
    return table


def _promises_table(promises: Sequence[Mapping[str, Any]]) -> Any:
    table = _table(
        "Promises of policy risk",
        "risk",
        "confidence",
        "λ",
        "completions",
        "observed",
        "evidence against it",
        "alert",
    )
    for each in promises:
        table.add_row(
            f"{each['risk']:g}",
            each["confidence"],
            f"{each['threshold']:.3f}",
            f"{each['completions']:,}",
            f"{each['observed']:.2%}",
            f"{each['evidence']:.3g}",
            "[bold red]yes[/]" if each["alert"] else "no",
        )
    return table


def _replicas_table(replicas: Sequence[Mapping[str, Any]]) -> Any:
    table = _table("Replicas", "replica", "confidence", "rows", "λ adaptive", "load level")
    for each in replicas:
        level = f"{each['load_level']:g}"
        if not each["measures"]:
            table.add_row(each["replica"], "-", "0", "-", level)
        for name, measure in each["measures"].items():
            rows = sum(measure["rows"].values())
            threshold = f"{measure['adaptive_threshold']:.3f}"
            table.add_row(each["replica"], name, f"{rows:,}", threshold, level)
    return table


def _table(title: str, *headings: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    return table


def _beta(part: Mapping[str, float]) -> str:
    return f"({part['alpha']:.2f}, {part['beta']:.2f})"


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """Numbers in [0, 1] as a line of blocks; of many, means of as many neighbours as needed."""
    parts = min(width, len(values))
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(max(round(mean * top), 0), top)] for mean in means)
