"""A trace as arrays gives the confidences that the logits themselves give, at any temperature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fathom.engine.confidences import ExitRows, confidences
from fathom.exits.calibration import fit_temperature
from fathom.tuning.rows import read_rows
from fathom.tuning.traces import TraceWriter
from fathom.types import ComputePolicy, Confidence
from tests.traces import METADATA, WIDTH, write_trace

MEASURES = (Confidence.SOFTMAX_GAP, Confidence.MAX_PROB, Confidence.ENTROPY)


@pytest.mark.parametrize("temperature", [0.3, 0.77, 1.0, 1.9, 3.9])
def test_confidences_follow_from_lse_at_any_temperature(tmp_path: Path, temperature: float) -> None:
    logits = write_trace(tmp_path / "t.parquet", requests=10)
    rows = read_rows(tmp_path / "t.parquet")
    states = torch.zeros(len(logits), WIDTH)
    for measure in MEASURES:
        compute = ComputePolicy(confidence=measure, exit_temperature=temperature)
        wanted, _ = confidences([compute] * len(logits), ExitRows(logits, states, states))
        found = rows.confidence(measure, temperature)
        np.testing.assert_allclose(found, wanted, atol=2e-3, err_msg=measure)
    assert (rows.confidence(Confidence.SATURATION, temperature) == rows.saturation).all()
    with pytest.raises(ValueError, match="classifier"):
        rows.confidence(Confidence.META)


def test_the_temperature_that_made_the_trace_is_found(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.parquet", requests=300, temperature=1.6)
    rows = read_rows(tmp_path / "t.parquet")
    assert fit_temperature(rows.deep, rows.lse).temperature == pytest.approx(1.6, rel=0.08)


def test_halves_are_of_whole_requests(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.parquet", requests=21, hidden=True)
    rows = read_rows(tmp_path / "t.parquet")
    assert rows.num_requests == 21
    assert rows.hidden is not None and rows.hidden.shape == (21 * 20, WIDTH)
    for share, count in ((0.5, 10), (0.3, 6), (0.999, 20)):
        one, other = rows.halves(3, share)
        assert one.num_requests == count
        assert not set(one.groups) & set(other.groups)
        assert len(one) + len(other) == len(rows)
        assert one.hidden is not None and len(one.hidden) == len(one)
    again, _ = rows.halves(3)
    assert (again.groups == rows.halves(3)[0].groups).all()
    assert (again.groups != rows.halves(4)[0].groups).any()
    with pytest.raises(ValueError, match="holds 1 request"):
        rows.select(rows.groups == 0).halves(0)


def test_requests_are_numbered_as_they_come(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.parquet", requests=12, tokens=2)
    assert read_rows(tmp_path / "t.parquet").groups.tolist() == [i // 2 for i in range(24)]


def test_what_made_the_trace_is_read(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.parquet", requests=2)
    source = read_rows(tmp_path / "t.parquet").source
    assert (source.adapter_digest, source.exit_depth, source.exit_cost) == ("adapter-1", 3, 0.25)
    assert source.costs.deep(8) == pytest.approx(3.5e-3)
    write_trace(tmp_path / "t.parquet", requests=2, exit_cost="cheap")
    with pytest.raises(ValueError, match="does not say what made it"):
        read_rows(tmp_path / "t.parquet")
    with TraceWriter(tmp_path / "none.parquet", METADATA):
        pass
    with pytest.raises(ValueError, match="has no rows"):
        read_rows(tmp_path / "none.parquet")


def test_logits_out_of_the_head_are_kept(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.parquet", requests=3)
    rows = read_rows(tmp_path / "t.parquet")
    assert torch.isfinite(torch.from_numpy(rows.lse)).all()
    assert (rows.best >= rows.second).all() and (rows.best >= rows.deep).all()
