"""``fathom bench engine`` on a tiny model: what it measures is checked, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fathom.tuning.traces import read_trace
from tests.command_line import Fathom

pytestmark = pytest.mark.parallel

FIGURES = [
    "engine",
    "mode",
    "batch",
    "dtype",
    "threads",
    "tokens_per_s",
    "ttft_ms_p50",
    "ttft_ms_p95",
    "tpot_ms_p50",
    "tpot_ms_p95",
    "exit_rate",
    "acceptance_rate",
    "layers_per_token",
    "rows_per_flush",
    "flops",
    "speedup_over_full",
    "ideal_speedup",
    "measured_over_ideal",
    "requests_differing_from_full",
    "runs",
]


def test_modes_and_a_peer(fathom: Fathom, tmp_path: Path, tiny_model: Path) -> None:
    prompts = [{"prompt": "ab"}, {"prompt": "cdefg"}, {"prompt": "ha"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    result = fathom(
        "bench", "engine", "--model", str(tiny_model), "--dtype", "float32", "--threads", "1",
        "--batch", "1,2", "--new-tokens", "16", "--num-prompts", "3", "--runs", "2",
        "--prompts", "in.jsonl", "--forced-exit-rate", "0.75", "--max-stack", "4",
        "--vs", "transformers", "--json", "out.json", "--trace", "drafts.parquet",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    drafts = read_trace(tmp_path / "drafts.parquet")
    assert 0 < sum(drafts["exited"].to_pylist()) < len(drafts)
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["engine"], row["mode"], row["batch"]): row for row in report["rows"]}
    modes = ("full", "exact", "rollback", "free")
    assert set(rows) == {("fathom", mode, batch) for mode in modes for batch in (1, 2)} | {
        ("transformers", "full", batch) for batch in (1, 2)
    }
    for row in rows.values():
        assert set(FIGURES) <= set(row)
        assert len(row["runs"]) == 2
        assert row["tokens_per_s"] > 0
        assert row["mode"] in result.stdout
    for batch in (1, 2):
        full, exact = rows["fathom", "full", batch], rows["fathom", "exact", batch]
        assert full["speedup_over_full"] == 1
        assert full["ideal_speedup"] is None
        assert full["exit_rate"] == 0
        # float32: lossless is lossless, and transformers agrees.
        assert exact["requests_differing_from_full"] == 0
        assert exact["differences"] == []
        assert rows["transformers", "full", batch]["requests_differing_from_full"] == 0
        assert rows["transformers", "full", batch]["flops"] is None
        free = rows["fathom", "free", batch]
        assert 0.3 < free["exit_rate"] < 0.9
        assert free["measured_over_ideal"] == pytest.approx(
            free["speedup_over_full"] / free["ideal_speedup"]
        )
    assert report["meta"]["interrupted"] is False
    assert set(report["meta"]["stage_costs_ms"]) == {"shallow", "shallow_full", "deep"}
