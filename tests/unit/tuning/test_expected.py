"""What points promise, and how soon a change of the workload is noticed, on small traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fathom.exits.drift import AGREEMENT, PointWatch
from fathom.exits.histogram import edges
from fathom.exits.shadow_watch import DEFAULT
from fathom.tuning.expected import expectations
from fathom.tuning.operating_points import OperatingPoints
from fathom.tuning.points_fit import fit_points
from fathom.tuning.rows import TraceRows, read_rows
from fathom.types import AcceptMode, ComputePolicy, PolicyName
from tests.points import points_of
from tests.shadows import completions_of, until_alarm
from tests.traces import write_trace

OWN = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.RISK, risk=0.1, exit_threshold=0.8)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "one.parquet"
    write_trace(path, requests=200, tokens=20, scale=6.0, seed=1)
    return path


@pytest.fixture(scope="module")
def rows(trace: Path) -> TraceRows:
    return read_rows(trace)


@pytest.fixture(scope="module")
def points(trace: Path, rows: TraceRows) -> OperatingPoints:
    return fit_points(rows, trace).points


def test_levels_and_shares_are_the_tables(points: OperatingPoints) -> None:
    fast = expectations(points, OWN)["fast"]
    table = points.calibration.losses
    assert len(fast.shares) == 64
    assert sum(fast.shares) == pytest.approx(1)
    assert 3 <= len(fast.levels) <= 5
    for level in fast.levels:
        place = int(np.abs(table.grid - edges(64)[level.bin]).argmin())
        assert table.grid[place] == pytest.approx(edges(64)[level.bin])
        each = table.exits[:, place] / table.rows
        assert level.share == pytest.approx(each.mean())
        assert level.tolerance >= max(0.05, 1.99 * each.std() / np.sqrt(len(each)))


def test_promises(points: OperatingPoints) -> None:
    found = expectations(points, OWN)
    assert found["exact"].loss is None  # nothing can be wrong
    assert found["exact"].levels
    fast = points.points["fast"].measured["agreement"]
    assert found["fast"].loss is not None
    assert found["fast"].loss >= 1 - fast + 0.02 - 1e-9
    assert found["fast"].compute == points.resolve("fast")
    assert found[DEFAULT].loss == 0.1
    assert expectations(None, ComputePolicy()).keys() == {DEFAULT}
    certified = expectations(points_of(), OWN)
    assert certified["balanced"].loss == 0.05  # policy risk: δ itself
    assert certified["sketch"].loss is None  # nobody measured its agreement
    assert certified["draft"].levels == ()  # it goes by another temperature than the table


def test_a_point_without_enough_data_is_left_out() -> None:
    few = points_of(requests=4)
    assert "balanced" not in expectations(few, OWN)
    assert "fast" in expectations(few, OWN)


def test_its_own_workload_is_no_drift_and_another_is(
    points: OperatingPoints, rows: TraceRows, tmp_path: Path
) -> None:
    expected = expectations(points, OWN)["fast"]
    compute = points.resolve("fast")
    rng = np.random.default_rng(0)
    own = list(completions_of(rows, compute))
    watch = PointWatch(expected, 0.05)
    for number in rng.integers(len(own), size=1000):
        watch.observe(own[number])
    assert watch.alarms == 0
    # The same confidences, but the full model goes its own way more often.
    write_trace(tmp_path / "wrong.parquet", requests=200, scale=6.0, temperature=4.0, seed=2)
    wrong = completions_of(read_rows(tmp_path / "wrong.parquet"), compute)
    assert until_alarm(watch, wrong, 200) is not None
    assert AGREEMENT in watch.reasons
    # Other confidences.
    write_trace(tmp_path / "unsure.parquet", requests=200, scale=1.5, seed=3)
    watch = PointWatch(expected, 0.05)
    assert until_alarm(watch, completions_of(read_rows(tmp_path / "unsure.parquet"), compute), 60)
