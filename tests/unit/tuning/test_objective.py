"""What settings are worth, on made-up traces whose answers are known."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from fathom.settings import ConfigError
from fathom.tuning.ledger import Ledger, Trial
from fathom.tuning.objective import Figures, compute_of, evaluate, first_rows, reference
from fathom.tuning.operating_points import load
from fathom.tuning.replay import replay_trace
from fathom.tuning.rows import TraceRows, read_rows
from fathom.tuning.study import Constraints, Study
from fathom.tuning.study_live import ONLY
from fathom.tuning.study_points import (
    front,
    front_rows,
    make_points,
    spanning,
    volume,
)
from fathom.tuning.study_traces import read_traces
from fathom.types import AcceptMode
from tests.traces import write_trace

FREE = {"mode": "free", "policy": "threshold", "confidence": "softmax_gap", "max_stack": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces")
    write_trace(path / "a.parquet", requests=80, tokens=30, scale=4)
    write_trace(path / "b.parquet", requests=60, tokens=30, scale=2, seed=3)
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> TraceRows:
    return read_rows(folder / "a.parquet")


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(name="s", traces=("a.parquet", "b.parquet"))


def test_no_exit_is_mode_full_less_the_exit_head(rows: TraceRows) -> None:
    never = {**FREE, "exit_threshold": 1.0}
    found = evaluate({**never, "pause_drafting": False}, [(rows, rows)])
    assert (found.quality, found.budget, found.exit_rate) == (1.0, 1.0, 0.0)
    # tests.traces: 0.9 + 3 ms a token at full depth; the exit head makes 0.9 into 1.
    assert found.full_tpot_ms == pytest.approx(3.9)
    assert found.tpot_ms == pytest.approx(4.0)
    # By default the exit is asked no more after the first rows, but by scouts.
    assert 3.9 < evaluate(never, [(rows, rows)]).tpot_ms < 3.92


def test_a_threshold_is_the_replay_at_it(rows: TraceRows) -> None:
    found = evaluate({**FREE, "exit_threshold": 0.6}, [(rows, rows)])
    known = replay_trace(rows, rows.gap, AcceptMode.FREE, 0.6, cap=8)
    assert found.quality == pytest.approx(1 - known.wrong)
    assert found.tpot_ms == pytest.approx(3.9 / known.speedup)
    assert found.budget == pytest.approx(1 - known.exits * 0.75)


def test_exact_loses_nothing(rows: TraceRows) -> None:
    setting = {**FREE, "mode": "exact", "exit_threshold": 0.3}
    found = evaluate(setting, [(rows, rows)])
    assert found.quality == 1
    assert 0 < found.exit_rate < evaluate({**FREE, "exit_threshold": 0.3}, [(rows, rows)]).exit_rate


@pytest.mark.parametrize("budget", [0.6, 0.8])
def test_a_budget_is_spent(rows: TraceRows, budget: float) -> None:
    found = evaluate({**FREE, "policy": "budget", "budget": budget}, [(rows, rows)])
    assert found.budget == pytest.approx(budget, abs=0.04)


def test_a_budget_out_of_reach_becomes_the_least() -> None:
    compute = compute_of({**FREE, "policy": "budget", "budget": 0.3, "max_stack": 1}, 0.25)
    assert compute.budget == pytest.approx(1 - 0.5 * 0.75)


def test_adaptive_follows_the_rows(rows: TraceRows) -> None:
    found = evaluate({**FREE, "policy": "adaptive"}, [(rows, rows)])
    assert 0 < found.exit_rate < 1
    assert found.quality < 1


def test_figures_are_the_mean_over_data_sets(folder: Path) -> None:
    parts = [read_rows(folder / name) for name in ("a.parquet", "b.parquet")]
    setting = {**FREE, "exit_threshold": 0.5}
    each = [evaluate(setting, [(part, part)]).quality for part in parts]
    both = evaluate(setting, [(part, part) for part in parts]).quality
    assert each[0] != each[1]
    assert both == pytest.approx(sum(each) / 2)


def test_losses_are_shares_and_constraints_are_in_their_units() -> None:
    study = Study(
        objectives=("tpot", "quality"),
        constraints=Constraints(max_quality_loss=0.05, max_tpot_ms=10),
    )
    found = Figures(quality=0.9, budget=0.5, tpot_ms=8.0, full_tpot_ms=16.0, exit_rate=0.7)
    assert found.losses(study) == pytest.approx([0.5, 0.1])
    assert reference(study) == [1.0, 0.05]
    assert found.violations(study) == pytest.approx({"max_quality_loss": 0.05, "max_tpot_ms": -2})


def test_a_sample_is_whole_requests(rows: TraceRows) -> None:
    some = first_rows(rows, 100)
    assert len(some) == 120  # of 30 rows each
    assert (np.unique(some.groups) == np.arange(4)).all()
    assert first_rows(rows, 0) is rows


def trials(study: Study, folder: Path) -> list[Trial]:
    parts = read_traces(study, folder).parts
    return [
        Trial(n, setting, evaluate(setting, parts), 0.1)
        for n, setting in enumerate(
            [
                *({**FREE, "exit_threshold": t} for t in (0.2, 0.5, 0.9)),
                {**FREE, "exit_threshold": 0.5, "max_stack": 1},
                {**FREE, "policy": "budget", "budget": 0.8},
                {**FREE, "mode": "exact", "exit_threshold": 0.5},
            ]
        )
    ]


def test_the_front_becomes_points_that_are_measured_on_other_requests(
    study: Study, folder: Path, tmp_path: Path
) -> None:
    found = trials(study, folder)
    traces = read_traces(study, folder)
    made = make_points(study, traces, found)
    made[ONLY].save(tmp_path / "points.yaml")
    read = load(tmp_path / "points.yaml")
    inside = front(study, found)
    assert 2 <= len(inside) == len(read.points)
    assert [t.figures.quality for t in inside] == sorted(t.figures.quality for t in inside)[::-1]
    for row, trial in zip(front_rows(study, found, made), inside, strict=True):
        compute = read.resolve(row["point"])
        assert compute.mode == trial.setting["mode"]
        assert compute.threshold == pytest.approx(
            trial.setting.get("exit_threshold", compute.threshold)
        )
        assert row["held_out"]["held_out_requests"] == 70
        assert row["held_out"]["agreement"] == pytest.approx(trial.figures.quality, abs=0.1)
    assert read.identity.weights_digest == "weights-1"
    assert read.identity.trace == "a.parquet b.parquet"
    assert 0 < volume(study, found) < 1


def test_a_large_front_is_thinned_to_what_spans_it(study: Study, folder: Path) -> None:
    found = trials(study, folder)
    inside = front(study, found)
    few = dataclasses.replace(study, max_points=2)
    kept = spanning(few, inside)
    assert len(kept) == 2 < len(inside)
    best = max(volume(study, pair) for pair in combinations(inside, 2))
    assert volume(study, kept) >= (1 - 1 / np.e) * best
    assert max(volume(study, [trial]) for trial in inside) in [volume(study, [t]) for t in kept]
    rows = front_rows(few, found, make_points(few, read_traces(few, folder), found))
    assert [row["trial"] for row in rows] == [trial.number for trial in inside]
    named = [row for row in rows if row["point"] is not None]
    assert [row["trial"] for row in named] == [trial.number for trial in kept]
    assert [row["point"] for row in named] == ["front-1", "front-2"]
    assert all((row["held_out"] is None) == (row["point"] is None) for row in rows)


def test_a_constraint_keeps_points_off_the_front(folder: Path) -> None:
    free = Study(name="s", traces=("a.parquet",))
    found = trials(free, folder)
    losses = sorted(1 - t.figures.quality for t in found)
    strict = Study(
        name="s", traces=("a.parquet",), constraints=Constraints(max_quality_loss=losses[2])
    )
    assert max(1 - t.figures.quality for t in front(strict, found)) <= losses[2]
    assert len(front(strict, found)) < len(front(free, found))
    none = Study(name="s", traces=("a.parquet",), constraints=Constraints(max_tpot_ms=1e-6))
    assert front(none, found) == [] and volume(none, found) == 0


def test_traces_of_two_engines_are_refused(folder: Path, tmp_path: Path) -> None:
    write_trace(tmp_path / "a.parquet")
    write_trace(tmp_path / "other.parquet", weights_digest="weights-2")
    write_trace(tmp_path / "left.parquet", exited=True)
    for name, words in (
        ("other.parquet", ("another model", "'weights-2'", "'weights-1'")),
        ("left.parquet", ("--exit-threshold 1",)),
        ("none.parquet", ("cannot read the trace",)),
    ):
        with pytest.raises(ConfigError) as caught:
            read_traces(Study(traces=("a.parquet", name)), tmp_path)
        for word in (name, *words):
            assert word in str(caught.value)


def test_the_ledger_knows_what_was_begun_and_what_is_done(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trials")
    settings = [{**FREE, "exit_threshold": t} for t in (0.1, 0.2, 0.3)]
    assert [ledger.begin(setting) for setting in settings] == [0, 1, 2]
    trial = Trial(1, settings[1], Figures(0.9, 0.5, 8.0, 16.0, 0.7), 0.25)
    ledger.finish(trial)
    again = Ledger(tmp_path / "trials")  # as a resumed study reads it
    assert again.begun() == dict(enumerate(settings))
    assert again.done() == [trial] == [again.result(1)]
    assert again.done(frozenset({1})) == []
    assert again.result(0) is None
