"""A trace holds every draft that the deep stage judged, and what was said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fathom.engine.trace import DraftRecord
from fathom.models.adapters import Adapter
from fathom.tuning.traces import TraceWriter, read_trace
from fathom.types import AcceptMode, ComputePolicy
from tests.unit.engine.conftest import (
    decoder,
    exit_adapter,
    make_engine,
    model_dir,
    request,
    run,
)

__all__ = ["decoder", "exit_adapter", "make_engine", "model_dir"]


def test_a_run_without_exits_traces_every_decision(
    make_engine, exit_adapter: Adapter, tmp_path: Path
) -> None:
    engine = make_engine(trained=exit_adapter)
    never = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=1.0)
    file = tmp_path / "trace.parquet"
    with TraceWriter(file, {"model": "tiny"}) as trace:
        engine.trace(trace.add)
        done = run(
            engine,
            [request(str(i), range(3, 10 + i), never, max_tokens=12) for i in range(4)]
            + [request("full", [3, 4], ComputePolicy(mode=AcceptMode.FULL))],
        )
        engine.trace(None)
        run(engine, [request("later", [3, 4, 5], never)])
        assert not file.exists()
    table = read_trace(file)
    assert table.schema.metadata[b"model"] == b"tiny"
    rows = table.to_pylist()
    assert len(rows) == 4 * 12
    for i in range(4):
        own = [row for row in rows if row["request"] == str(i)]
        assert [row["deep_token"] for row in own] == done[str(i), 0].ids
        assert [row["position"] for row in own] == list(range(6 + i, 18 + i))
    for row in rows:
        assert row["agrees"] == (row["shallow_token"] == row["deep_token"])
        assert not row["exited"]
        assert 0 <= row["confidence"] <= 1
        assert 0 <= row["entropy"] <= torch.tensor(37.0).log()
    assert 0 < sum(row["agrees"] for row in rows) < len(rows)


def test_exits_are_traced_once_they_are_judged(make_engine, exit_adapter, tmp_path: Path) -> None:
    engine = make_engine(trained=exit_adapter)
    records: list[DraftRecord] = []
    engine.trace(records.append)
    exact = ComputePolicy(exit_threshold=0.1)
    done = run(engine, [request("a", [5, 6, 7, 8], exact, max_tokens=30)])
    usage = done["a", 0].last.usage.compute
    assert sum(record.exited for record in records) == usage.verified
    assert sum(record.exited and record.agrees for record in records) == usage.accepted


def test_what_is_no_trace_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no.parquet"
    with pytest.raises(ValueError, match=r"no\.parquet: cannot read"):
        read_trace(path)
    path.write_text("no")
    with pytest.raises(ValueError, match=r"no\.parquet: cannot read"):
        read_trace(path)
