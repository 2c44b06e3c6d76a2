"""A study's figures: what it found, and what its points do, as PNG beside the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom.compute import ComputePolicy, PolicyName
from fathom.exits.bias import Method
from fathom.tuning.adaptive_replay import live_thresholds
from fathom.tuning.budget_replay import live_rows
from fathom.tuning.ledger import Trial
from fathom.tuning.objective import compute_of, first_rows, with_first_threshold
from fathom.tuning.parallel_coordinates import parallel_coordinates
from fathom.tuning.plotting import BLUE, COLORS, GREY, ORANGE, name_points, panels, save, style
from fathom.tuning.report import judge_rows, reliability_diagram
from fathom.tuning.rows import Floats, Measure, TraceRows
from fathom.tuning.study import Objective, Study
from fathom.tuning.study_live import ONLY
from fathom.tuning.study_traces import Traces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 3000
"""Of a trace that λ is followed over."""

_LINES = 4
_MEDIAN_OF = 101

_AXES = {
    Objective.QUALITY: "tokens unlike the full model's (%)",
    Objective.BUDGET: "cost of a token (% of full's)",
    Objective.TPOT: "predicted time a token (% of full's)",
    Objective.THROUGHPUT: "time for all requests (% of full's)",
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn.

    Attributes:
        skipped: why a figure was not, by its name.
    """

    files: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


class NoData(Exception):
    """A figure of something that the study does not have; the message says what."""


def draw_study(
    study: Study,
    traces: Traces,
    trials: Sequence[Trial],
    front: Sequence[Mapping[str, Any]],
    folder: Path,
) -> Drawn:
    """Draw what there is to a study.

    Args:
        front: rows of ``study_points.front_rows``. folder: for the files; made if it is not there.

    Raises:
        ImportError: without matplotlib.
    """
    drawers: dict[str, Callable[[], Figure]] = {
        "pareto_front": lambda: _pareto(study, trials, front),
        "exit_depth": lambda: _depths(traces, front),
        "threshold_over_time": lambda: _thresholds(traces, front),
        "parallel_coordinates": lambda: _coordinates(study, trials, front),
    }
    for path, choose, rest in zip(traces.paths, traces.choose, traces.rest, strict=True):
        drawers[f"reliability-{path.stem}"] = partial(_reliability, choose, rest)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Drawn()
    with style():
        for name, draw in drawers.items():
            try:
                drawn.files.append(save(draw(), folder / f"{name}.png"))
            except NoData as reason:
                drawn.skipped[name] = str(reason)
    return drawn


def _reliability(choose: TraceRows, rest: TraceRows) -> Figure:
    return reliability_diagram(judge_rows(choose, rest))


def _pareto(study: Study, trials: Sequence[Trial], front: Sequence[Mapping[str, Any]]) -> Figure:
    """Trials by the first objective and each other one, with the constraints."""
    measured = [trial for trial in trials if trial.rung is None]
    if len(study.objectives) < 2:
        raise NoData(f"one objective ({study.objectives[0]}) has a best trial and no front")
    if not measured:
        raise NoData("no trial was measured on all rows")
    losses = 100 * np.array([trial.figures.losses(study) for trial in measured])
    kept = np.array([max([0, *t.figures.violations(study).values()]) <= 0 for t in measured])
    names = {row["trial"]: row["point"] for row in front}
    inside = np.array([trial.number in names for trial in measured])
    figure, plots = panels(len(study.objectives) - 1)
    first, *others = (Objective(name) for name in study.objectives)
    for column, (plot, other) in enumerate(zip(plots, others, strict=True), 1):
        x, y = losses[:, 0], losses[:, column]
        limits = _limits(study, measured[0])
        plot.scatter(x[~kept], y[~kept], s=22, marker="x", color=GREY, alpha=0.6, linewidths=1)
        plot.scatter(x[kept & ~inside], y[kept & ~inside], s=26, color=GREY, alpha=0.6)
        plot.scatter(x[inside], y[inside], s=48, color=BLUE, zorder=3)
        _bound(plot, "x", limits.get(first))
        _bound(plot, "y", limits.get(other))
        plot.set_xlim(*_range(x, x[inside], limits.get(first)))
        shown = x <= plot.get_xlim()[1]
        plot.set_ylim(*_range(y[shown], y[inside], limits.get(other)))
        points = [names.get(trial.number) is not None for trial in measured]
        plot.scatter(x[points], y[points], s=60, color=ORANGE, edgecolor="white", zorder=4)
        labels = [str(names[trial.number]) for trial in measured if names.get(trial.number)]
        name_points(plot, x[points], y[points], [each.removeprefix("front-") for each in labels])
        plot.set(xlabel=_AXES[first], ylabel=_AXES[other])
    plots[0].set_title(f"{study.name}: {int(inside.sum())} of {len(trials)} trials on the front")
    figure.legend(handles=_legend(study), loc="outside lower center", ncols=5, fontsize=11)
    return figure


def _legend(study: Study) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 7}
    handles: list[Any] = [
        Line2D([], [], color=ORANGE, label="operating point front-N", **dot),
        Line2D([], [], color=BLUE, label="on the front", **dot),
        Line2D([], [], color=GREY, label="dominated", **dot),
    ]
    if _limits(study, None):
        handles += [
            Line2D([], [], color=GREY, label="misses a constraint", **{**dot, "marker": "x"}),
            Patch(color=ORANGE, alpha=0.1, label="outside the constraints"),
        ]
    return handles


def _limits(study: Study, trial: Trial | None) -> dict[Objective, float]:
    """Constraints in the axes' units, in percent; those of time need a trial, for ``full``'s."""
    own, found = study.constraints, {}
    if own.max_quality_loss is not None:
        found[Objective.QUALITY] = 100 * own.max_quality_loss
    if own.max_tpot_ms is not None:
        full = own.max_tpot_ms if trial is None else trial.figures.full_tpot_ms
        found[Objective.TPOT] = 100 * own.max_tpot_ms / full
    return found


def _bound(plot: Any, axis: str, limit: float | None) -> None:
    """Shade what lies above a constraint."""
    if limit is not None:
        line, span = (plot.axvline, plot.axvspan) if axis == "x" else (plot.axhline, plot.axhspan)
        line(limit, color=ORANGE, linewidth=1, linestyle="--")
        span(limit, 1e9, color=ORANGE, alpha=0.1, linewidth=0)


def _range(values: Floats, best: Floats, limit: float | None) -> tuple[float, float]:
    """What an axis shows: the front whole, and of the others those that are not far off."""
    low = float(values.min())
    shown = best if len(best) else values
    high = max(float(shown.max()), float(np.quantile(values, 0.75)))
    if limit is not None:
        high = max(float(shown.max()), 1.6 * limit)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _depths(traces: Traces, front: Sequence[Mapping[str, Any]]) -> Figure:
    """Layers of each point's tokens, held-out requests."""
    points = [row for row in front if row["point"] and row["held_out"]]
    if not points:
        raise NoData("no trial became an operating point")
    figure, (plot,) = panels(1, width=8.0, height=1.9 + 0.42 * len(points))
    depths: dict[int, list[float]] = {}
    for place, row in enumerate(points):
        source = traces.of(row["setting"].get("exit", ONLY)).choose[0].source
        share = 100 * row["held_out"]["exit_rate"]
        for depth, own in ((source.exit_depth, share), (source.num_layers, 100 - share)):
            depths.setdefault(depth, [0.0] * len(points))[place] = own
    left = np.zeros(len(points))
    for number, depth in enumerate(sorted(depths)):
        own = np.array(depths[depth])
        color = BLUE if depth == max(depths) else COLORS[1 + number % (len(COLORS) - 1)]
        plot.barh(range(len(points)), own, left=left, color=color, label=f"{depth} layers")
        for place, share in enumerate(own):
            if share >= 6:
                at = left[place] + share / 2
                label = {"ha": "center", "va": "center", "color": "white", "fontweight": "bold"}
                plot.text(at, place, f"{share:.0f}", fontsize=10, **label)
        left += own
    names = [f"{row['point']}  {row['setting']['mode']}" for row in points]
    plot.set_yticks(range(len(points)), names)
    plot.invert_yaxis()
    plot.grid(visible=False)
    plot.set(xlim=(0, 100), xlabel="share of held-out tokens (%)", title="Depth of tokens")
    figure.legend(loc="outside lower center", ncols=len(depths))
    return figure


def _thresholds(traces: Traces, front: Sequence[Mapping[str, Any]]) -> Figure:
    """λ that the rows of held-out requests meet, under the policies of the front that move it."""
    moving = [
        row
        for row in sorted(front, key=lambda row: row["point"] is None)
        if row["setting"]["policy"] in (PolicyName.ADAPTIVE, PolicyName.BUDGET)
    ][:_LINES]
    if not moving:
        raise NoData("no trial on the front has a policy that moves λ (adaptive, budget)")
    exits = dict.fromkeys(row["setting"].get("exit", ONLY) for row in moving)
    shown = [(name, place) for name in exits for place in range(len(traces.of(name).paths))]
    figure, plots = panels(len(shown))
    for plot, (name, place) in zip(plots, shown, strict=True):
        own = traces.of(name)
        rows = first_rows(own.rest[place], _ROWS)
        for color, row in zip(COLORS, moving, strict=False):
            if row["setting"].get("exit", ONLY) != name:
                continue
            compute = compute_of(row["setting"], rows.source.exit_cost)
            values = _met(with_first_threshold(compute, own.choose[0]), rows)
            label = row["point"] or f"trial {row['trial']}"
            label += f": {compute.policy.value}"
            if compute.budget is not None:
                label += f" {compute.budget:.2f}"
            plot.plot(values, color=color, linewidth=0.5, alpha=0.25)
            plot.plot(_rolling(values), color=color, linewidth=2.2, label=label)
        plot.set(title=own.paths[place].stem, xlabel="tokens decided", ylim=(-0.02, 1.02))
    plots[0].set_ylabel("threshold λ of the confidence")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=11)
    return figure


def _met(compute: ComputePolicy, rows: TraceRows) -> Floats:
    """[n] λ of each row; NaN where the exit was not asked."""
    measure = Measure(compute.confidence, compute.exit_temperature)
    if compute.policy is PolicyName.ADAPTIVE:
        return live_thresholds(measure, measure.of(rows), rows.agrees, Method.EM)[0]
    assert compute.budget is not None
    _, thresholds = live_rows(
        rows,
        measure,
        compute.budget,
        first=compute.exit_threshold,
        max_stack=compute.max_stack,
        mode=compute.mode,
    )
    return thresholds


def _rolling(values: Floats) -> Floats:
    """[n] running medians; of fewer rows at the ends."""
    half = _MEDIAN_OF // 2
    padded = np.pad(values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, _MEDIAN_OF)
    return np.asarray(np.nanmedian(windows, axis=1))


def _shown(value: Any) -> Any:
    """A value as an axis takes it: yes and no are words."""
    return ("yes" if value else "no") if isinstance(value, bool) else value


def _coordinates(
    study: Study, trials: Sequence[Trial], front: Sequence[Mapping[str, Any]]
) -> Figure:
    """Every trial's settings and losses."""
    if len(trials) < 2:
        raise NoData("one trial has nothing to be compared with")
    columns: dict[str, list[Any]] = {
        name: [_shown(trial.setting.get(name)) for trial in trials] for name in study.dimensions()
    }
    varied = {n: v for n, v in columns.items() if len({x for x in v if x is not None}) > 1}
    if not varied:
        raise NoData("the space has one setting")
    losses = 100 * np.array([trial.figures.losses(study) for trial in trials])
    objectives = {
        "\n".join(wrap(_AXES[Objective(name)], 14)): losses[:, place].tolist()
        for place, name in enumerate(study.objectives)
    }
    numbers = {row["trial"] for row in front}
    return parallel_coordinates(
        {name.replace("_", "\n"): values for name, values in varied.items()} | objectives,
        [100 * trial.figures.quality for trial in trials],
        strong=[trial.number in numbers for trial in trials],
        faint=[trial.rung is not None for trial in trials],
        title=f"{study.name}: {len(trials)} trials",
        legend="tokens like the full model's (%)",
    )
