"""Tables for the README and the figure, from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from experiments.eero.run import Result
    from experiments.eero.speed import Speed

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {
    "static": "static head",
    "global": "one threshold",
    "msdnet": "MSDNet",
    "random": "random exits",
}


def write_tables(
    file: Path, results: Sequence[Result], speeds: Mapping[str, Sequence[Speed]]
) -> None:
    """Put the tables between the marks in the README."""
    text = file.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    tables = "\n".join(_table(group) for group in by_task(results))
    tables += _speed_table(speeds)
    file.write_text(f"{before}{BEGIN}\n{tables}{END}{after}", encoding="utf-8")


def by_task(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one task together."""
    names = dict.fromkeys(result.task for result in results)
    return [[result for result in results if result.task == name] for name in names]


def _table(group: Sequence[Result]) -> str:
    first = group[0]
    accuracy = np.array([result.accuracy for result in group])
    overthought = np.array([result.overthought for result in group])
    lines = [
        f"### {first.title}",
        "",
        f"{first.rows[0]:,} rows to calibrate, {first.rows[1]:,} to test. Each head by itself:",
        "",
        "| head | " + " | ".join(str(m) for m in range(1, len(first.costs) + 1)) + " |",
        "|---|" + "---:|" * len(first.costs),
        "| cost B_m | " + " | ".join(f"{cost:.3f}" for cost in first.costs) + " |",
        "| accuracy % | " + " | ".join(f"{a:.2f}" for a in 100 * accuracy.mean(0)) + " |",
        "| right where the last is wrong % | "
        + " | ".join(f"{a:.2f}" for a in 100 * overthought.mean(0))
        + " |",
        "",
        "| budget | plain: realised | off by, at most | % "
        "| EERO: planned | realised | off by, at most | FLOPs | % | "
        + " | ".join(f"{name} % (at)" for name in NAMES.values())
        + " | EERO − one threshold | EERO − deepest |",
        "|" + "---:|" * (9 + len(NAMES) + 2),
    ]
    for place, point in enumerate(first.points):
        points = [result.points[place] for result in group]
        realised = np.array([p.eero.realised for p in points])
        eero = 100 * np.array([p.eero.accuracy for p in points])
        planned = np.array([p.planned for p in points])
        spent = np.array([p.plain.realised for p in points])
        cells = [
            f"{point.budget:.2f}",
            f"{spent.mean():.3f}",
            f"{np.abs(spent / point.budget - 1).max():.1%}",
            f"{100 * np.mean([p.plain.accuracy for p in points]):.2f}",
            f"{planned.mean():.3f}",
            f"{realised.mean():.3f}",
            f"{np.abs(realised / planned - 1).max():.1%}",
            f"{np.mean([p.flops for p in points]):.3f}",
            f"**{eero.mean():.2f}** ± {eero.std(ddof=1) if len(group) > 1 else 0:.2f}",
        ]
        for name in NAMES:
            found = [o for p in points if (o := p.others[name]) is not None]
            if not found:
                cells.append("–")
                continue
            right = 100 * np.mean([o.accuracy for o in found])
            cells.append(f"{right:.2f} ({np.mean([o.realised for o in found]):.3f})")
        tuned = 100 * np.array([o.accuracy for p in points if (o := p.others["global"])])
        cells.append(f"{(eero - tuned).mean():+.2f}")
        cells.append(f"{(eero - 100 * accuracy[:, -1]).mean():+.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", ""])


def _speed_table(speeds: Mapping[str, Sequence[Speed]]) -> str:
    lines = [
        "### Time",
        "",
        "Requests of 128 held-out rows, reading them included; budgets took turns.",
        "",
        "| classifier | budget | FLOPs | ms a row | times as fast |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {title} | {'none' if s.budget is None else s.budget} | {s.flops:.3f} "
        f"| {1e3 * s.seconds:.2f} | {s.speedup:.2f} |"
        for title, found in speeds.items()
        for s in found
    ]
    return "\n".join([*lines, "", ""])


def write_figure(file: Path, results: Sequence[Result]) -> None:
    """Accuracy against realised budget, one panel a classifier, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_task(results)
    figure, panels = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.6), squeeze=False)
    styles = {"static": "s:", "global": "^-", "msdnet": "d-", "random": "x:"}
    for panel, group in zip(panels[0], groups, strict=True):
        deepest = 100 * float(np.mean([result.accuracy[-1] for result in group]))
        panel.axhline(deepest, color="grey", linestyle="--", linewidth=1, label="deepest head")
        for name, style in styles.items():
            xs, ys = [], []
            for place in range(len(group[0].points)):
                found = [o for r in group if (o := r.points[place].others[name]) is not None]
                if found:
                    xs.append(np.mean([o.realised for o in found]))
                    ys.append(100 * np.mean([o.accuracy for o in found]))
            panel.plot(xs, ys, style, label=NAMES[name], linewidth=1, markersize=4)
        eero = [[r.points[p].eero for r in group] for p in range(len(group[0].points))]
        panel.errorbar(
            [np.mean([o.realised for o in point]) for point in eero],
            [100 * np.mean([o.accuracy for o in point]) for point in eero],
            yerr=[100 * np.std([o.accuracy for o in point]) for point in eero],
            fmt="o-", color="black", label="EERO", linewidth=1.5, markersize=4,
        )  # fmt: skip
        panel.set_title(group[0].title, fontsize=10)
        panel.set_xlabel("realised budget (share of full compute)")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("accuracy, %")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)
