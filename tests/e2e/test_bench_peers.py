"""``fathom bench peers`` on a tiny model with the peer that is installed here: transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.command_line import Fathom

pytestmark = pytest.mark.parallel


def test_a_peer_that_runs_and_one_that_cannot(
    fathom: Fathom, tmp_path: Path, tiny_model: Path
) -> None:
    texts = ("one two three", "four five", "six")
    lines = (json.dumps({"prompt": text}) for text in texts)
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    result = fathom(
        "bench", "peers", "--peers", "transformers,vllm,llama.cpp", "--model", str(tiny_model),
        "--modes", "exact,free@1", "--dtype", "float32", "--batch", "1,3", "--num-prompts", "2",
        "--new-tokens", "6", "--prompts", "prompts.jsonl", "--runs", "2", "--json", "out.json",
        "--peers-dir", "peers", "--python", f"vllm={sys.executable}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["engine"], row["mode"], row["batch"]): row for row in report["rows"]}
    modes = ("full", "exact", "free@1")
    kinds = (*(("fathom", mode) for mode in modes), ("transformers", "full"))
    assert set(rows) == {(*kind, batch) for kind in kinds for batch in (1, 3)}
    for (engine, _, batch), row in rows.items():
        assert row["bits"] == 32
        assert row["peer"] == ("" if engine == "fathom" else engine)
        assert row["requests"] == max(batch, 2)
        assert len(row["runs"]) == 2
        assert row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]
        # float32, and threshold 1 lets nothing go: all say the same.
        assert (row["same_first_token"], row["common_tokens"]) == (1, 6)
    meta = report["meta"]
    assert meta["prompts"] == "prompts.jsonl"
    assert len(set(meta["prompt_tokens"])) > 1
    assert meta["peers"]["transformers"]["python"] == sys.executable
    assert meta["peers"]["transformers"]["idle_cpu_s"] < 1
    # Told, in the report and on the terminal, with what would help.
    assert "no vllm" in meta["skipped"]["vllm"]
    assert "GGUF" in meta["skipped"]["llama.cpp"]
    for name in ("vllm", "llama.cpp"):
        assert f"skipped {name}: " in result.stdout
    assert meta["interrupted"] is False


def test_modes_and_prompts_that_cannot_be(fathom: Fathom, tmp_path: Path) -> None:
    for options, told in (
        (("--modes", "free@2"), "threshold of 'free@2' must be a number from 0 to 1"),
        (("--modes", "random"), "random"),
        (("--prompts", "p.jsonl", "--prompt-tokens", "8"), "leave --prompts out"),
    ):
        result = fathom("bench", "peers", *options)
        assert result.returncode == 2, result.stderr
        assert told in result.stderr
