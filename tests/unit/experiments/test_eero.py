"""The baselines of experiments/eero spend what they say, and the report tells what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.eero import baselines, report
from experiments.eero.run import Point, Result, fit_plain
from experiments.eero.speed import Speed
from fathom.models.classifier_files import Answers

COSTS = np.array([0.2, 0.45, 0.7, 1.0])


def answers(rows: int, seed: int) -> Answers:
    """Four heads, the deeper the better, surer where they are right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    ease = rng.random(rows)[:, None]
    right = rng.random((rows, 4)) < np.clip(ease + np.array([0.2, 0.4, 0.55, 0.65]), 0, 1)
    predicted = np.where(right, labels[:, None], (labels[:, None] + 1) % 3)
    evidence = 3 * ease + right + rng.normal(0, 0.5, (rows, 4)) - 2
    confidence = 1 / (1 + np.exp(-evidence))
    return Answers(confidence, predicted, labels, np.ones(rows, dtype=np.int64))


@given(budget=st.floats(0.21, 0.99), seed=st.integers(0, 9))
@settings(max_examples=40)
def test_policies_spend_their_budget_on_the_calibration_rows(budget: float, seed: int) -> None:
    rows = answers(1000, seed)
    for policy in (baselines.one_threshold, baselines.msdnet):
        found = policy(rows, rows, COSTS, budget)
        assert found.realised == pytest.approx(budget, abs=0.006), policy.__name__
    plain = fit_plain(rows, COSTS, budget)
    assert plain.cost == pytest.approx(budget, abs=0.006)


@pytest.mark.parametrize(("budget", "head"), [(0.2, 0), (0.44, 1), (0.69, 2), (0.98, 3)])
def test_the_static_head_is_the_deepest_that_fits(budget: float, head: int) -> None:
    rows = answers(500, 0)
    alone = COSTS - np.array([0.0, 0.01, 0.02, 0.03])
    found = baselines.static(rows, rows, alone, budget)
    assert found == baselines.Outcome(alone[head], rows.correct[:, head].mean())
    assert baselines.static(rows, rows, alone, 0.1) is None


def test_random_exits_are_their_own_expectation() -> None:
    rows = answers(500, 1)
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    found = baselines.at_random(rows, shares, COSTS)
    exits = np.random.default_rng(0).choice(4, (400, 500), p=shares)
    drawn = [baselines.outcome(rows, each, COSTS) for each in exits]
    assert found.realised == pytest.approx(np.mean([o.realised for o in drawn]), abs=0.005)
    assert found.accuracy == pytest.approx(np.mean([o.accuracy for o in drawn]), abs=0.005)


def test_confidence_is_worth_more_than_chance() -> None:
    rows, test = answers(4000, 2), answers(4000, 3)
    sure = baselines.msdnet(rows, test, COSTS, 0.5)
    shares = np.array(fit_plain(rows, COSTS, 0.5).shares)
    assert sure.accuracy > baselines.at_random(test, shares, COSTS).accuracy + 0.02


def test_the_readme_gets_tables_and_a_figure(tmp_path: Path) -> None:
    spent, right = baselines.Outcome(0.49, 0.9), baselines.Outcome(0.5, 0.88)
    others = {"static": None, "global": right, "msdnet": spent, "random": right}
    points = [Point(0.5, 0.5, spent, 0.48, 0.1, [0.5, 0.5], right, others)]
    results = [
        Result("task", "Task", seed, [0.3, 1.0], [0.8, 0.91], [0.03, 0.0], (10, 11), points)
        for seed in (0, 1)
    ]
    file = tmp_path / "README.md"
    file.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    report.write_tables(
        file, results, {"Task": [Speed(None, 0.012, 1.0, 1.0), Speed(0.5, 0.004, 3.0, 0.5)]}
    )
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| 0.50 |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "0.50", "0.500", "0.0%", "88.00", "0.500", "0.490", "2.0%", "0.480", "**90.00** ± 0.00",
        "–", "88.00 (0.500)", "90.00 (0.490)", "88.00 (0.500)", "+2.00", "-1.00",
    ]  # fmt: skip
    assert "| Task | none | 1.000 | 12.00 | 1.00 |\n| Task | 0.5 | 0.500 | 4.00 | 3.00 |" in text
    report.write_figure(tmp_path / "accuracy.png", results)
    assert 1000 < (tmp_path / "accuracy.png").stat().st_size < 100_000
