"""What the shadow has found, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shadow_table(shadow: Mapping[str, Any]) -> Any:
    """A row an operating point, of the part ``shadow`` of ``GET /v1/exits``."""
    from rich.table import Table

    table = Table(
        title=f"Shadow: {shadow['rate']:.2%} of the completions, beside the full model",
        title_justify="left",
        header_style="bold",
    )
    for number, heading in enumerate(
        ("operating point", "completions", "tokens", "agreement", "at least", "exit rate",
         "layers a token", "stability index", "evidence of drift", "drift")
    ):  # fmt: skip
        table.add_column(heading, justify="left" if number == 0 else "right")
    for name, point in shadow["points"].items():
        evidence = point["evidence"]
        table.add_row(
            name,
            f"{point['completions']:,}",
            f"{point['decided']:,}",
            _share(point["agreement"]),
            _share(point["expected"]["least_agreement"]),
            _share(point["exit_rate"]),
            _number(point["layers_per_token"]),
            _number(point["psi"]),
            f"{max(evidence.values()):.3g}" if evidence else "-",
            f"[bold red]{', '.join(point['reasons'])}[/]" if point["alert"] else "no",
        )
    return table


def shadow_words(shadow: Mapping[str, Any]) -> list[str]:
    """What to do, and where the rest is."""
    words = []
    drifted = [name for name, point in shadow["points"].items() if point["alert"]]
    if drifted:
        words.append(
            f"Traffic has drifted from what {', '.join(drifted)} was measured on: run `fathom "
            "tune` again on a fresh trace."
        )
    run = shadow.get("mlflow")
    if run and run["error"]:
        words.append(f"MLflow at {run['uri']} does not answer: {run['error']}")
    elif run and run["run_id"]:
        words.append(f"MLflow at {run['uri']}: experiment fathom-serve, run {run['run_id']}")
    return words


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
