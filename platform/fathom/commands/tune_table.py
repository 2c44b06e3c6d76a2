"""What ``fathom tune`` prints in the end: the front, the replay's errors, what to do with both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fathom.commands.tune_live import show_baseline, show_errors

if TYPE_CHECKING:
    from fathom.tuning.study import Study


def show(study: Study, report: Mapping[str, Any]) -> int:
    """Print it; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    from fathom.tuning.ratios import serve_options

    console = Console()
    console.width = max(console.width, 110)
    done = f"{study.name}: {report['trials']} trials in {report['seconds']:.1f} s"
    if not report["front"]:
        console.print(
            f"{done}; none keeps to the constraints: loosen them, or widen the space.",
            highlight=False,
        )
        return 1
    whose = "held-out requests, times of trials" if study.is_served else "held-out requests"
    table = Table(
        title=f"{done}; hypervolume {report['hypervolume']:.4f}; figures of {whose}",
        title_justify="left",
    )
    for heading in ("point", "mode", "policy", "confidence", "λ or budget"):
        table.add_column(heading)
    # A replay knows nothing of replicas: of an application, what the trial gave is told.
    times = ("replicas", "tokens/s", "TPOT (ms)") if study.is_served else ("TPOT (ms)", "speed-up")
    for heading in ("stack", "agreement", "exits", "cost", *times):
        table.add_column(heading, justify="right")
    points = [row for row in report["front"] if row["point"]]
    for row in points:
        setting, own = row["setting"], row["held_out"]
        place = setting.get("exit_threshold", setting.get("budget"))
        table.add_row(
            row["point"], setting["mode"], setting["policy"], setting["confidence"],
            "follows" if place is None else f"{place:.3f}", str(setting["max_stack"]),
            f"{own['agreement']:.2%}", f"{own['exit_rate']:.1%}", f"{own['budget']:.3f}",
            *_times(study, row),
        )  # fmt: skip
    console.print(table)
    if len(points) < len(report["front"]):
        console.print(
            f"{len(points)} of {len(report['front'])} on the front are kept as points (max_points)",
            highlight=False,
        )
    for name, reason in report["figures_skipped"].items():
        console.print(f"no figure {name}: {reason}", highlight=False)
    if report["replay_error"]:
        show_errors(console, report["replay_error"])
        if report["baseline"] is not None:
            show_baseline(console, report["baseline"])
    elif study.finalists and not study.live.prompts:
        console.print("nothing ran live: live.prompts names the traces' prompts", highlight=False)
    for row in points if study.is_served else ():
        options = serve_options(row["setting"], study.live.cpus)
        console.print(f"{row['point']} was served by: fathom serve {options}", highlight=False)
    for name in report["points_files"]:
        console.print(f"{name}: serve it by `fathom serve --operating-points {name}`",
                      highlight=False)  # fmt: skip
    return 0


def _times(study: Study, row: Mapping[str, Any]) -> list[str]:
    if study.is_served:
        times = [f"{row['tokens_per_s']:.1f}", f"{row['tpot_ms']:.2f}"]
        return [row["setting"]["replica_ratio"], *times]
    own = row["held_out"]
    return [f"{own['predicted_tpot_ms']:.2f}", f"{own['predicted_speedup']:.2f}"]
