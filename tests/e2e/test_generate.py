"""``fathom generate`` as a user runs it: with the default model, and with a tiny one for speed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fathom.config import DEFAULT_MODEL
from fathom.models.pull import pull
from fathom.models.resolve import resolve_model
from fathom.models.tokenizer import load_tokenizer
from tests.command_line import COMMAND, Fathom, environment

pytestmark = pytest.mark.parallel

PROMPTS = [
    {"prompt": "The capital of France is"},
    {"messages": [{"role": "user", "content": "Say hello."}], "question_id": 7},
    {"prompt": "Line one\u2028one, two, three,"},
    {"prompt": "def add(a, b):"},
]
OPTIONS = ("--new-tokens", "12", "--ignore-eos", "--threads", "1", "--dtype", "float32")
TINY = ("--kv-cache-bytes", "8000000", *OPTIONS)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in PROMPTS))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_a_file_of_prompts(
    fathom: Fathom, fathom_here: Fathom, prompts: Path, tmp_path: Path
) -> None:
    pull()
    result = fathom("generate", "--prompts", "in.jsonl", "--json", "out.jsonl", *OPTIONS)
    assert result.returncode == 0, result.stderr
    assert "mode exact (lossless)" in result.stderr
    records = read(tmp_path / "out.jsonl")
    tokenizer = load_tokenizer(resolve_model(DEFAULT_MODEL))
    assert len(records) == len(PROMPTS)
    for prompt, record in zip(PROMPTS, records, strict=True):
        if "prompt" in prompt:
            assert record["prompt_token_ids"] == tokenizer.encode(prompt["prompt"])
        else:
            assert record["prompt_token_ids"] == tokenizer.apply_chat_template(prompt["messages"])
        assert len(record["token_ids"]) == len(record["depths"]) == 12
        assert record["finish_reason"] == "length"
        assert record["text"] == tokenizer.decode(record["token_ids"])
        assert record["usage"]["completion_tokens"] == 12
        assert record["usage"]["compute"]["decided"] == 12
        assert record["usage"]["compute"]["mode"] == "exact"
    assert not list(tmp_path.glob("out.jsonl.*"))
    # The same job again, finished: nothing to do, nothing changed.
    again = fathom_here(
        "generate", "--prompts", "in.jsonl", "--json", "out.jsonl", "--resume", *OPTIONS
    )
    assert again.returncode == 0
    assert "all 4 results are there" in again.stderr
    assert read(tmp_path / "out.jsonl") == records


def test_a_prompt_is_answered_on_the_terminal(fathom: Fathom) -> None:
    pull()
    result = fathom("generate", "What is the capital of France?", *OPTIONS)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "\x1b" not in result.stdout
    assert re.search(
        r"12 tokens · [\d.]+ tok/s · mode exact \(lossless\) · exits \d+% .*"
        r"layers/token of 30 · mean depth [\d.]+ · TTFT \d+ ms",
        result.stderr,
    )


def test_raw_text_from_standard_input_in_colour(fathom: Fathom, tiny_model: Path) -> None:
    result = fathom(
        "generate", "--raw", "--mode", "free", "--forced-exit-rate", "0.5", "--seed", "1",
        "--model", str(tiny_model), *TINY, "--new-tokens", "60",
        stdin="abc\n", FORCE_COLOR="1", TERM="xterm-256color",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "mode free (lossy)" in result.stderr
    assert len(set(re.findall(r"\x1b\[(3\d)m", result.stdout))) == 2  # exits, and full depth


def test_an_interrupted_job_goes_on(fathom: Fathom, tmp_path: Path, tiny_model: Path) -> None:
    total = 40
    lines = [json.dumps({"prompt": f"prompt number {i}"}) for i in range(total)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    job = ("generate", "--prompts", "in.jsonl", "--json", "out.jsonl", "--model", str(tiny_model))
    options = (*TINY, "--new-tokens", "100", "--mode", "full")
    # One sequence at a time, so that some are done when the others have not begun.
    process = subprocess.Popen(
        [*COMMAND, *job, *options, "--max-num-seqs", "1"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_text().count("\n") >= 2:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert not (tmp_path / "out.jsonl").exists()
    done = read(partial)[1:]
    assert 1 <= len(done) < total

    refused = fathom(*job, *options)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    other = fathom(*job, *options, "--resume", "--seed", "3")
    assert other.returncode == 2
    assert "other prompts or options" in other.stderr

    # A line that the interruption cut is generated again.
    partial.write_text(partial.read_text() + f'{{"index": {total - 1}, "tok')
    resumed = fathom(*job, *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{total - len(done)} requests" in resumed.stderr
    records = read(tmp_path / "out.jsonl")
    assert not partial.exists()
    assert len(records) == total
    tokenizer = load_tokenizer(tiny_model)
    for i, record in enumerate(records):
        assert tokenizer.decode(record["prompt_token_ids"]) == f"prompt number {i}"
        assert len(record["token_ids"]) == 100
    for entry in done:
        assert records[entry.pop("index")] == entry


def test_results_on_standard_output_are_in_order(
    fathom: Fathom, prompts: Path, tiny_model: Path
) -> None:
    result = fathom(
        "generate", "--prompts", "in.jsonl", "--model", str(tiny_model), *TINY, "--max-num-seqs=2"
    )
    assert result.returncode == 0, result.stderr
    ids = [json.loads(line)["prompt_token_ids"] for line in result.stdout.splitlines()]
    tokenizer = load_tokenizer(tiny_model)
    assert len(ids) == len(PROMPTS)
    for place in (0, 2, 3):
        assert ids[place] == tokenizer.encode(PROMPTS[place]["prompt"])


def test_a_prompt_that_does_not_fit_is_named(
    fathom: Fathom, prompts: Path, tiny_model: Path
) -> None:
    options = ("--model", str(tiny_model), *TINY, "--new-tokens", "100")
    result = fathom("generate", "--prompts", "in.jsonl", *options)
    assert result.returncode == 2
    assert "in.jsonl:2: " in result.stderr
    assert "exceed the context of 128" in result.stderr
