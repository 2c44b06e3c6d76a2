"""Where a server saturates: throughput and latency over the load that was offered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fathom.tuning.plotting import BLUE, GREEN, GREY, ORANGE, panels, save, style


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path, *, unit: str, title: str) -> Path:
    """Draw a sweep as PNG.

    Args:
        rows: of ``serve_figures.load_row``, each with ``load``, what was offered.
        unit: of the load: "requests/s", or "requests at once".

    Raises:
        ImportError: without matplotlib.
    """
    with style():
        figure, (rates, latencies) = panels(2)
        offered = [row["load"] for row in rows]
        rates.plot(offered, [row["output_throughput"] for row in rows], "o-", color=BLUE)
        rates.set(title=title, xlabel=f"load, {unit}", ylabel="output tokens/s", ylim=(0, None))
        requests = rates.twinx()
        requests.grid(visible=False)
        requests.plot(
            offered, [row["request_throughput"] for row in rows], "s--", color=GREEN, label="all"
        )
        if rows[0]["request_goodput"] is not None:
            goodput = [row["request_goodput"] for row in rows]
            requests.plot(offered, goodput, "^--", color=ORANGE, label="within the SLO")
        requests.set(ylabel="requests/s", ylim=(0, None))
        requests.legend(loc="upper left")
        for metric, color in (("ttft", BLUE), ("tpot", ORANGE)):
            for percent, line in ((50, "o-"), (99, "o:")):
                values = [row[f"p{percent}_{metric}_ms"] for row in rows]
                latencies.plot(
                    offered, [value or float("nan") for value in values], line,
                    color=color, label=f"{metric.upper()} p{percent}",
                )  # fmt: skip
        for name, limit in (rows[0].get("slo_ms") or {}).items():
            latencies.axhline(limit, color=GREY, linewidth=1)
            latencies.annotate(
                f"SLO {name}", (offered[0], limit), (0, 3), textcoords="offset points",
                fontsize=9, color=GREY,
            )  # fmt: skip
        latencies.set(title="latency", xlabel=f"load, {unit}", ylabel="ms", yscale="log")
        latencies.legend()
        return save(figure, path)
