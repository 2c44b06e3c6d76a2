"""A trace holds every draft that the deep stage judged, and what was said of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fathom.engine.trace import DraftRecord
from fathom.exits.calibration import TEMPERATURES
from fathom.models.adapters import Adapter
from fathom.tuning.traces import SCHEMA, TraceWriter, describe, read_trace
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


def test_logits_and_lse_give_back_the_confidences(
    make_engine, exit_adapter: Adapter, tmp_path: Path
) -> None:
    engine = make_engine(trained=exit_adapter)
    never = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=1.0)
    with TraceWriter(tmp_path / "trace.parquet", describe(engine)) as trace:
        engine.trace(trace.add, hidden=True)
        run(engine, [request("a", range(3, 12), never, max_tokens=20)])
    table = read_trace(tmp_path / "trace.parquet")
    metadata = table.schema.metadata
    assert metadata[b"weights_digest"].decode() == engine.info.weights_digest
    assert metadata[b"adapter_digest"].decode() == exit_adapter.digest
    assert 0 < float(metadata[b"exit_cost"]) < 1
    rows = table.to_pylist()
    assert len(rows) == 20
    for row in rows:
        top = [
            math.exp(row["best_logit"] / temperature - lse)
            for temperature, lse in zip(TEMPERATURES, row["lse"], strict=True)
        ]
        assert top == sorted(top, reverse=True)  # the hotter, the less sure
        colder = sum(temperature < 1 for temperature in TEMPERATURES)
        assert top[colder - 1] + 1e-5 >= row["max_prob"] >= top[colder] - 1e-5
        second = row["max_prob"] * math.exp(row["second_logit"] - row["best_logit"])
        assert row["max_prob"] - second == pytest.approx(row["confidence"], abs=1e-5)
        assert 0 <= row["saturation"] <= 1
        assert row["max_prob"] >= row["confidence"]
        assert (row["deep_logit"] == row["best_logit"]) or not row["agrees"]
        state = np.frombuffer(row["hidden"], "<f2")
        assert len(state) == len(exit_adapter.norm) and np.isfinite(state).all()


def test_a_trace_of_an_older_version_is_refused(tmp_path: Path) -> None:
    old = pa.schema(list(SCHEMA)[:10])
    pq.write_table(old.empty_table(), tmp_path / "old.parquet")
    with pytest.raises(ValueError, match=r"version 1, which lacks 'probe'; record it again.*gener"):
        read_trace(tmp_path / "old.parquet")
    newer = SCHEMA.with_metadata({"version": "3"})
    pq.write_table(newer.empty_table(), tmp_path / "new.parquet")
    with pytest.raises(ValueError, match="version 3, this one reads 2; record it again"):
        read_trace(tmp_path / "new.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no trace: it has no column 'request'"):
        read_trace(tmp_path / "other.parquet")


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
