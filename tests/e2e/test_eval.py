"""``fathom eval`` on a tiny model: what it reports is checked, not how good the model is."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fathom.tuning.traces import read_trace
from tests.command_line import COMMAND, Fathom, environment

pytestmark = pytest.mark.parallel

ROW = {
    "task", "mode", "n", "metric", "value", "ci_low", "ci_high", "agreement", "acceptance",
    "exit_rate", "coverage_at_precision_95", "layers_per_token", "tokens_per_s",
    "speedup_over_full",
}  # fmt: skip
GSM8K = [
    {"question": f"{i} and {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
    for i in range(5)
]
MULTI30K = [{"de": "Ein Hund.", "en": "A dog."}, {"de": "Zwei", "en": "Two"}]
COPA = [{"query": "It rained, so", "choices": ["he got wet.", "it burned."], "gold": 0}] * 3
SPEC = [
    {"category": category, "turns": [f"{category} {i}", "again"]}
    for category in ("qa", "math")
    for i in range(3)
]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    files = {
        "gsm8k/test_a.jsonl.gz": gzip.compress(lines(GSM8K)),
        "choice/copa.jsonl.gz": gzip.compress(lines(COPA)),
        "spec_bench/questions_a.jsonl.gz": gzip.compress(lines(SPEC)),
        "wikitext2/test.txt.gz": gzip.compress(b"A text of a few words. " * 20),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def options(tiny_model: Path) -> tuple[str, ...]:
    return (
        "--model", str(tiny_model), "--dtype", "float32", "--threads", "1", "--max-num-seqs", "2",
        "--kv-cache-bytes", "8000000", "--new-tokens", "12", "--exit-layer", "2",
    )  # fmt: skip


def test_generation_in_three_modes(
    fathom: Fathom, fathom_here: Fathom, tmp_path: Path, data: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(lines(MULTI30K))
    result = fathom(
        "eval", "--tasks", "gsm8k,multi30k", "--modes", "free,exact", "--runs", "2",
        "--data", "multi30k=pairs.jsonl", "--forced-exit-rate", "0.5", "--limit", "4",
        "--json", "out.json", "--trace", "drafts.parquet", *options, FATHOM_DATA=str(data),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    trace = read_trace(tmp_path / "drafts.parquet")
    asked = set(trace["request"].to_pylist())
    assert asked == {*(f"gsm8k/{i}" for i in range(4)), "multi30k/0", "multi30k/1"}
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["task"], row["mode"], row["metric"]): row for row in report["rows"]}
    for task, metric, n in (("gsm8k", "exact_match", 4), ("multi30k", "bleu", 2)):
        found = [(row["mode"], row["metric"]) for row in report["rows"] if row["task"] == task]
        assert found == [
            ("full", metric), ("full", "nll_under_full"),
            *((mode, name) for mode in ("free", "exact")
              for name in (metric, "rougeL_to_full", "nll_under_full")),
        ]  # fmt: skip
        assert all(row["n"] == n for row in report["rows"] if row["task"] == task)
        full, exact, free = (rows[task, mode, metric] for mode in ("full", "exact", "free"))
        assert full["exit_rate"] == 0
        assert full["speedup_over_full"] == 1
        assert full["layers_per_token"] == 4
        # Lossless is lossless, and nothing beats greedy answers by much.
        assert exact["value"] == full["value"]
        assert rows[task, "exact", "rougeL_to_full"]["value"] == 1
        nll = {mode: rows[task, mode, "nll_under_full"]["value"] for mode in ("full", "exact")}
        assert nll["full"] == pytest.approx(nll["exact"])
        assert nll["full"] <= rows[task, "free", "nll_under_full"]["value"] + 0.1
        assert free["exit_rate"] > 0.2
    for row in report["rows"]:
        assert set(row) == ROW
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row["mode"] in result.stdout
        assert (row["agreement"] is None) == (row["mode"] == "full")
    assert "free (lossy)" in result.stdout
    assert report["meta"]["job"]["tasks"]["multi30k"]["file"] == "pairs.jsonl"
    assert not list(tmp_path.glob("out.json.*"))
    again = fathom_here(
        "eval", "--tasks", "gsm8k,multi30k", "--modes", "free,exact", "--runs", "2",
        "--data", "multi30k=pairs.jsonl", "--forced-exit-rate", "0.5", "--limit", "4",
        "--json", "out.json", "--resume", *options, FATHOM_DATA=str(data),
    )  # fmt: skip
    assert again.returncode == 0
    assert "the evaluation is complete" in again.stderr


def test_text_is_scored_at_full_depth(
    fathom: Fathom, tmp_path: Path, data: Path, options: tuple[str, ...]
) -> None:
    result = fathom(
        "eval", "--tasks", "copa,wikitext2", "--base", "--json", "out.json", *options,
        FATHOM_DATA=str(data),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["task"], row["mode"], row["metric"], row["n"]) for row in rows] == [
        ("copa", "full", "acc_norm", 3),
        ("copa", "full", "acc", 3),
        ("wikitext2", "full", "perplexity", 4),  # 460 bytes in windows of 127
    ]
    assert all(row["value"] in (0, 1) for row in rows[:2])  # three times the same question
    # A random model knows nothing of its 257 tokens.
    assert 150 < rows[2]["value"] < 400
    assert all(row["speedup_over_full"] is None for row in rows)


def test_spec_bench_has_a_row_a_category(
    fathom: Fathom, tmp_path: Path, data: Path, options: tuple[str, ...]
) -> None:
    result = fathom(
        "eval", "--tasks", "spec_bench", "--modes", "full,exact", "--limit", "2",
        "--json", "out.json", *options, FATHOM_DATA=str(data),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["task"], row["mode"], row["n"]) for row in rows] == [
        (task, mode, n)
        for task, n in (("spec_bench/qa", 2), ("spec_bench/math", 2), ("spec_bench", 4))
        for mode in ("full", "exact")
    ]
    assert all(row["metric"] is None and row["value"] is None for row in rows)
    assert all(row["speedup_over_full"] > 0 for row in rows)


def test_an_interrupted_evaluation_goes_on(
    fathom: Fathom, tmp_path: Path, data: Path, options: tuple[str, ...]
) -> None:
    many = [GSM8K[i % 5] for i in range(60)]
    (tmp_path / "many.jsonl").write_bytes(lines(many))
    job = (
        "eval", "--tasks", "gsm8k", "--data", "gsm8k=many.jsonl", "--modes", "full,free",
        "--json", "out.json", *options,
    )  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *job], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    partial = tmp_path / "out.json.partial"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_text().count("\n") >= 4:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    assert not (tmp_path / "out.json").exists()
    kept = partial.read_text().splitlines()

    refused = fathom(*job)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    other = fathom(*job, "--resume", "--limit", "3")
    assert other.returncode == 2
    assert "other data or options" in other.stderr

    # A line that the interruption cut is measured again.
    partial.write_text("\n".join(kept) + '\n{"key": "gsm8k/full/run 0/8", "val')
    resumed = fathom(*job, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["n"] for row in rows} == {60}
    assert not partial.exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("", "say what to evaluate: --tasks with a list of gsm8k"),
        ("--tasks gsm9k", "got 'gsm9k'"),
        ("--tasks gsm8k --modes deep", "--modes must be a list of full, exact"),
        ("--tasks gsm8k --modes full@0.5", "nothing exits in mode full, so write full"),
        ("--tasks gsm8k --base --modes exact", "--base has no exit head"),
        ("--tasks gsm8k --base --adapter default", "--base is the model without an adapter"),
        ("--tasks gsm8k --limit 0", "--limit must be at least 1"),
        ("--tasks gsm8k --resume", "--resume needs --json"),
        ("--tasks gsm8k --json none/out.json", "there is no such folder"),
        ("--tasks gsm8k --json .", "is a folder; name a file in it"),
        ("--tasks gsm8k --trace t.parquet --modes full", "none of --modes makes any"),
        ("--tasks gsm8k --trace t.parquet --base", "--no-agreement and --base leave out"),
        ("--tasks gsm8k --data copa=x.jsonl", "TASK=FILE with one of the --tasks"),
        ("--tasks gsm8k --data gsm8k=none.jsonl", "there is no such file"),
    ],
)
def test_usage_errors(fathom_here: Fathom, args: str, says: str) -> None:
    result = fathom_here("eval", *args.split())
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_data_says_where_to_get_it(fathom_here: Fathom) -> None:
    result = fathom_here("eval", "--tasks", "gsm8k", FATHOM_DATA="")
    assert result.returncode == 1
    assert "FATHOM_DATA is unset" in result.stderr
    assert "huggingface.co/datasets/openai/gsm8k" in result.stderr
    assert "--data gsm8k=FILE" in result.stderr
    assert result.stderr.count("\n") == 1
