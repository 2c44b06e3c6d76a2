"""A study's figures: what is drawn of real trials, and what is left out with its reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from fathom.tuning import figures
from fathom.tuning.budget_replay import live_rows
from fathom.tuning.figures import NoData, draw_study
from fathom.tuning.ledger import Trial
from fathom.tuning.objective import evaluate
from fathom.tuning.parallel_coordinates import parallel_coordinates
from fathom.tuning.rows import Measure, read_rows
from fathom.tuning.study import Constraints, Space, Study
from fathom.tuning.study_points import front_rows, make_points
from fathom.tuning.study_traces import Traces, read_traces
from tests.traces import write_trace

COMMON = {"confidence": "max_prob", "max_stack": 8, "exit_temperature": 1.0}
STUDY = Study(
    name="s",
    traces=("a.parquet", "b.parquet"),
    constraints=Constraints(max_quality_loss=0.3),
    space=Space(policy=["threshold", "budget", "adaptive"], confidence="max_prob"),
)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    folder = tmp_path_factory.mktemp("traces")
    write_trace(folder / "a.parquet", requests=80, tokens=30, scale=4)
    write_trace(folder / "b.parquet", requests=60, tokens=30, scale=3, seed=3)
    return read_traces(STUDY, folder)


@pytest.fixture(scope="module")
def trials(traces: Traces) -> list[Trial]:
    settings: list[dict[str, Any]] = [
        *({"mode": "free", "policy": "threshold", "exit_threshold": t} for t in (0.05, 0.6, 0.9)),
        {"mode": "exact", "policy": "threshold", "exit_threshold": 0.5},
        {"mode": "free", "policy": "budget", "budget": 0.7},
        {"mode": "free", "policy": "adaptive"},
    ]
    return [
        Trial(n, own, evaluate(own, traces.parts), 0.1)
        for n, own in enumerate({**COMMON, **setting} for setting in settings)
    ]


def rows_of(study: Study, traces: Traces, trials: list[Trial]) -> list[dict[str, Any]]:
    return front_rows(study, trials, make_points(study, traces, trials))


def test_all_figures_of_a_study_are_drawn(
    traces: Traces, trials: list[Trial], tmp_path: Path
) -> None:
    drawn = draw_study(STUDY, traces, trials, rows_of(STUDY, traces, trials), tmp_path / "figures")
    assert drawn.skipped == {}
    assert {path.name for path in drawn.files} == {
        "pareto_front.png", "exit_depth.png", "threshold_over_time.png",
        "parallel_coordinates.png", "reliability-a.png", "reliability-b.png",
    }  # fmt: skip
    for path in drawn.files:
        image = np.asarray(Image.open(path).convert("L"))
        assert min(image.shape) > 300
        assert 0.01 < (image < 250).mean() < 0.8, path.name


def test_what_a_study_does_not_have_is_left_out_with_its_reason(
    traces: Traces, trials: list[Trial], tmp_path: Path
) -> None:
    one = dataclasses.replace(STUDY, objectives=("tpot",))
    own = [trial for trial in trials if trial.setting["policy"] == "threshold"]
    drawn = draw_study(one, traces, own, rows_of(one, traces, own), tmp_path)
    assert set(drawn.skipped) == {"pareto_front", "threshold_over_time"}
    assert "one objective (tpot)" in drawn.skipped["pareto_front"]
    assert "adaptive, budget" in drawn.skipped["threshold_over_time"]
    nothing = draw_study(STUDY, traces, trials[:1], [], tmp_path)
    assert set(nothing.skipped) == {"exit_depth", "threshold_over_time", "parallel_coordinates"}


def test_the_front_names_its_points_and_shades_what_is_not_allowed(
    traces: Traces, trials: list[Trial]
) -> None:
    rows = rows_of(STUDY, traces, trials)
    plots = figures._pareto(STUDY, trials, rows).axes
    assert len(plots) == 2
    for plot in plots:
        assert sorted(text.get_text() for text in plot.texts) == sorted(
            row["point"].removeprefix("front-") for row in rows
        )
        (line,) = plot.lines
        assert list(line.get_xdata()) == [pytest.approx(30)] * 2
        low, high = plot.get_xlim()
        assert low < 0 and high > 30
    stopped = [dataclasses.replace(trial, rung=0) for trial in trials]
    with pytest.raises(NoData, match="all rows"):
        figures._pareto(STUDY, stopped, [])


def test_depths_are_those_of_the_points(traces: Traces, trials: list[Trial]) -> None:
    rows = rows_of(STUDY, traces, trials)
    (plot,) = figures._depths(traces, rows).axes
    widths = [bar.get_width() for bar in plot.patches]
    shallow, deep = widths[: len(rows)], widths[len(rows) :]
    assert shallow == pytest.approx([100 * row["held_out"]["exit_rate"] for row in rows])
    assert [a + b for a, b in zip(shallow, deep, strict=True)] == pytest.approx([100] * len(rows))
    # tests.traces: the exit has 3 layers, the model 6.
    assert plot.get_legend_handles_labels()[1] == ["3 layers", "6 layers"]


def test_the_drawn_threshold_is_the_one_that_rows_met(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.parquet", requests=40, tokens=30, scale=4)
    rows, measure = read_rows(tmp_path / "a.parquet"), Measure()
    exits, thresholds = live_rows(rows, measure, 0.6, first=0.5, max_stack=3)
    asked = ~np.isnan(thresholds)
    assert 0 < (~asked).sum() < len(rows) / 2
    assert not exits[~asked].any()
    assert (exits[asked] == (measure.of(rows)[asked] > thresholds[asked])).all()
    assert thresholds[0] == 0.5 and len(np.unique(thresholds[asked])) > 10
    smooth = figures._rolling(thresholds)
    assert len(smooth) == len(rows)
    assert smooth[600] == np.nanmedian(thresholds[550:651])


def test_lines_cross_their_axes_at_their_values() -> None:
    figure = parallel_coordinates(
        {"mode": ["exact", "free", "exact"], "budget": [None, 0.5, 1.0]},
        [90.0, 95.0, 100.0],
        strong=[False, False, True],
        faint=[True, False, False],
        title="t",
        legend="quality",
    )
    plot = figure.axes[0]
    lines = {line.get_linewidth(): line.get_ydata() for line in plot.lines[2:]}
    assert set(lines) == {0.8, 1.0, 2.4}
    assert lines[0.8][1] < 0  # which has no budget
    assert (lines[1.0][1], lines[2.4][1]) == (0, 1)
    assert abs(lines[1.0][0] - 0.75) < 0.05 and abs(lines[2.4][0] - 0.25) < 0.05
    words = {text.get_text() for text in plot.texts}
    assert words == {"exact", "free", "0.5", "1", "none"}
