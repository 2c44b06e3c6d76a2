from __future__ import annotations

import json
from pathlib import Path

import pytest

from fathom.commands.options import UsageError
from fathom.commands.records import Completion, ResultsFile
from fathom.types import ComputeUsage, FinishReason, RequestOutput, Token, Usage

JOB = {"model": "m", "compute": {"mode": "exact"}, "stop": ("a", "b")}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_ordered_and_complete(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("from before\n")
    results = ResultsFile(out, JOB, 3, resume=False)
    for index in (2, 0, 1):
        assert out.read_text() == "from before\n"
        results.add(index, {"n": index})
    assert results.is_complete
    results.finish()
    assert lines(out) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_resuming_keeps_what_was_done_and_drops_a_cut_line(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ResultsFile(out, JOB, 3, resume=False).add(1, {"n": 1})
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(partial.read_text() + '{"index": 0, "n')
    results = ResultsFile(out, JOB, 3, resume=True)
    assert results.done == {1: {"n": 1}}
    results.add(0, {"n": 0})
    results.add(2, {"n": 2})
    results.finish()
    assert lines(out) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_an_interrupted_job_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ResultsFile(out, JOB, 3, resume=False).add(1, {"n": 1})
    with pytest.raises(UsageError, match="go on with --resume"):
        ResultsFile(out, JOB, 3, resume=False)
    with pytest.raises(UsageError, match="other prompts or options"):
        ResultsFile(out, {**JOB, "model": "another"}, 3, resume=True)
    assert ResultsFile(out, JOB, 3, resume=True).done == {1: {"n": 1}}


def test_resuming_where_nothing_was_begun_starts(tmp_path: Path) -> None:
    assert not ResultsFile(tmp_path / "out.jsonl", JOB, 2, resume=True).done


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write: No such file or directory"):
        ResultsFile(tmp_path / "none" / "out.jsonl", JOB, 1, resume=False)


def test_a_completion_gathers_outputs() -> None:
    completion = Completion()
    completion.add(RequestOutput("0", 0, [Token(5, 10)], "a"))
    usage = Usage(2, 2, 1, ComputeUsage(mode="free", decided=2, exited=1, depth_sum=40))
    completion.add(RequestOutput("0", 0, [Token(6, 30)], "b", FinishReason.STOP, usage=usage))
    record = completion.record((1, 2))
    assert record["prompt_token_ids"] == [1, 2]
    assert record["token_ids"] == [5, 6]
    assert record["depths"] == [10, 30]
    assert record["text"] == "ab"
    assert record["finish_reason"] == "stop"
    assert record["usage"]["total_tokens"] == 4
    assert record["usage"]["compute"]["exit_rate"] == 0.5
    assert record["usage"]["compute"]["mean_depth"] == 20
    assert "error" not in record
