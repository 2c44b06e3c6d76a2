"""``fathom bench serve`` against a real server: what it counts is what the server did."""

from __future__ import annotations

import json
from pathlib import Path

from tests.command_line import Fathom
from tests.ray_fixtures import KEYS, TestServer


def test_a_sweep_of_rates(fathom: Fathom, server: TestServer, tmp_path: Path) -> None:
    server.wait_until_idle()
    before = server.metrics()
    result = fathom(
        "bench", "serve", "--base-url", f"{server.url}/v1", "--sweep", "4,20", "--num-prompts", "3",
        "--input-len", "9", "--output-len", "5", "--goodput", "ttft:60000,tpot:60000",
        "--num-warmups", "0", "--json", "out.json", "--plot", "sweep.png",
        FATHOM_API_KEY=KEYS[0], OPENAI_API_KEY="",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["meta"]["model"] == server.model
    assert [row["load"] for row in report["rows"]] == [4, 20]
    for row in report["rows"]:
        assert (row["completed"], row["failed"], row["errors"]) == (3, 0, {})
        assert row["total_output_tokens"] == 15
        assert row["tokens_counted_by"] == "server"
        assert row["request_goodput"] == row["request_throughput"]
        assert 0 < row["p50_ttft_ms"] <= row["p99_ttft_ms"] <= row["p99_e2el_ms"]
        assert row["compute"]["layers_per_token"] > 0
        assert row["client"]["send_lag_ms_p99"] is not None
    assert "layers/token" in result.stdout
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    server.wait_until_idle()
    after = server.metrics()
    for name, moved in (("generation_tokens_total", 30), ("prompt_tokens_total", None)):
        told = moved or sum(row["total_input_tokens"] for row in report["rows"])
        assert after[f"fathom_{name}"] - before.get(f"fathom_{name}", 0) == told


def test_a_closed_loop_over_token_ids_and_its_failures(
    fathom: Fathom, server: TestServer, tmp_path: Path
) -> None:
    options = ("--base-url", server.url, "--num-prompts", "4", "--max-concurrency", "2",
               "--output-len", "4", "--json", "out.json", "--model", server.model)  # fmt: skip
    ids = ("--endpoint", "/v1/completions", "--vocab-size", "1000", "--input-len", "7")
    result = fathom("bench", "serve", *options, *ids, "--api-key", KEYS[1])
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["total_input_tokens"] == 4 * 7
    assert row["max_concurrent_requests"] == 2
    # Every failure is told, and where nothing works the command fails.
    result = fathom("bench", "serve", *options, "--api-key", "wrong")
    assert result.returncode == 1
    assert "no request was completed" in result.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["completed"], row["errors"]) == (0, {"http 401": 4})
    assert "4 x http 401" in result.stdout
