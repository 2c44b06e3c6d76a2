"""Settings run live on a tiny model, beside replays of its own trace."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fathom.commands import serve
from fathom.commands.tune_live import LiveRuns
from fathom.engine.flush_rules import FlushWhen
from fathom.settings import ConfigError
from fathom.tuning import study_points
from fathom.tuning.finalists import Finalist, read_verified, run_finalist
from fathom.tuning.ledger import Trial, write_whole
from fathom.tuning.live_figures import FULL
from fathom.tuning.live_parts import LivePart, first_tokens, live_parts
from fathom.tuning.live_setting import InProcess
from fathom.tuning.objective import compute_of, evaluate
from fathom.tuning.rows import TraceRows, read_rows
from fathom.tuning.runner import LiveTrials, engine_config, run_full
from fathom.tuning.study import Study, load_study
from fathom.tuning.study_live import Evaluation, Exit, Live
from fathom.tuning.study_traces import Traces, read_traces
from tests.tiny_models import tiny_model
from tests.traces import write_trace
from tests.tuned import record

__all__ = ["tiny_model"]

TOKENS = 20
SETTING = {
    "mode": "exact", "policy": "threshold", "confidence": "softmax_gap", "max_stack": 3,
    "exit_temperature": 1.0, "pause_drafting": False,
}  # fmt: skip
STUDY = Study(
    name="s",
    traces=("t.parquet",),
    live=Live(prompts=("p.jsonl",), requests=10, new_tokens=TOKENS),
    choose_share=0.3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    path = tmp_path_factory.mktemp("recorded")
    record(path, tiny_model)
    return path


@pytest.fixture(scope="module")
def traces(folder: Path) -> Traces:
    return read_traces(STUDY, folder)


@pytest.fixture(scope="module")
def part(folder: Path, traces: Traces) -> LivePart:
    (found,) = LiveRuns(STUDY, folder, traces, folder).held_out
    return found


def at(rows: TraceRows, share: float) -> float:
    """λ above which this share of the rows lies."""
    return float(np.quantile(rows.gap, 1 - share))


@pytest.mark.parametrize(("share", "stack"), [(0.5, 3), (0.9, 1), (0.9, 8)])
def test_exact_is_live_what_the_replay_says(part: LivePart, share: float, stack: int) -> None:
    setting = {**SETTING, "max_stack": stack, "exit_threshold": at(part.rows, share)}
    (run,) = InProcess(STUDY).run(setting, [part])
    live = run.figures
    replay = evaluate(setting, [part.pair])
    assert live.requests == len(part.prompts) == 10
    assert live.tokens == len(part.rows)
    assert live.quality.value == live.rescored.value == live.full_rescored.value == 1
    assert live.exit_rate.value == pytest.approx(replay.exit_rate)
    assert live.budget.value == pytest.approx(replay.budget)
    assert 0.1 < replay.exit_rate < 1


def test_budgets_in_exact_pay_for_drafts_that_do_not_stand(part: LivePart) -> None:
    setting = {**SETTING, "policy": "budget", "budget": 0.85}
    (run,) = InProcess(STUDY).run(setting, [part])
    live = run.figures.exit_rate
    replay = evaluate(setting, [part.pair])
    assert live.low <= replay.exit_rate <= live.high
    assert replay.exit_rate == pytest.approx(live.value, abs=0.06)


@pytest.mark.parametrize("policy", ["threshold", "budget", "adaptive"])
def test_free_is_within_its_interval_of_the_replay(part: LivePart, policy: str) -> None:
    setting = {**SETTING, "mode": "free", "policy": policy}
    if policy == "threshold":
        setting["exit_threshold"] = at(part.rows, 0.4)
    if policy == "budget":
        setting["budget"] = 0.8
    (run,) = InProcess(STUDY).run(setting, [part])
    live = run.figures
    replay = evaluate(setting, [part.pair])
    assert live.quality.low <= replay.quality <= live.quality.high
    assert live.exit_rate.low <= replay.exit_rate <= live.exit_rate.high
    # In float32 one pass over the text says what the engine's flushes said.
    assert live.quality.value == pytest.approx(live.rescored.value)
    assert live.full_rescored.value == 1
    assert policy == "adaptive" or live.quality.value < 1
    for figure in (live.tpot_ms, live.full_tpot_ms, live.speedup):
        assert 0 < figure.low <= figure.value <= figure.high
    assert live.speedup.value == pytest.approx(live.full_tpot_ms.value / live.tpot_ms.value)


def test_a_live_trial_is_held_against_full_on_the_first_engine(part: LivePart) -> None:
    full = run_full(InProcess(STUDY), [part])
    assert (full.quality, full.exit_rate) == (1, 0)
    assert full.tpot_ms == full.full_tpot_ms > 0
    threshold = at(part.rows, 0.6)
    several = {**SETTING, "exit_threshold": threshold, "threads": 1, "max_num_seqs": 5,
               "max_num_batched_tokens": 64}  # fmt: skip
    found = LiveTrials(InProcess(STUDY), [part], full).run(several)
    assert (found.full_tpot_ms, found.full_tokens_per_s) == (full.tpot_ms, full.tokens_per_s)
    assert found.quality == 1
    # Five requests share each pass, and none waits for the end of another.
    assert found.tokens_per_s > full.tokens_per_s
    study = dataclasses.replace(STUDY, objectives=("throughput",))
    assert found.losses(study) == [full.tokens_per_s / found.tokens_per_s]


def test_flush_rules_are_a_matter_of_time(part: LivePart) -> None:
    setting = {**SETTING, "exit_threshold": at(part.rows, 0.6), "max_num_seqs": 4}
    replay = evaluate(setting, [part.pair])
    for rule in FlushWhen:
        own = {**setting, "flush_rule": rule.value}
        assert engine_config(STUDY, own, part.rows.source).flush_rule == rule
        (run,) = InProcess(STUDY).run(own, [part], beside_full=False)
        assert run.figures.quality.value == 1
        assert run.figures.exit_rate.value == pytest.approx(replay.exit_rate)


def test_what_is_served_is_written_on_the_point(part: LivePart) -> None:
    live = dataclasses.replace(STUDY.live, cpus=3)
    study = dataclasses.replace(STUDY, evaluate=Evaluation.SERVED, live=live)
    names = study.names("threshold")
    assert {"replica_ratio", "flush_rule", "max_num_seqs"} < set(names)
    assert "threads" not in names
    setting = {"replica_ratio": "1:2", "flush_rule": "full", "max_num_seqs": 4}
    trial = Trial(3, setting, run_full(InProcess(STUDY), [part]), 1.0)
    options = "--shallow-replicas 1 --deep-replicas 2 --max-num-seqs 4 --flush-rule full"
    assert study_points._needs(study, trial) == (
        f", served with {json.dumps(setting)} on 3 cores: fathom serve {options}"
    )
    assert study_points._served(study, trial)["served_tokens_per_s"] > 0
    # The options are fathom serve's.
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    config = serve.serve_config(parser.parse_args(["serve", *options.split()]))
    assert (config.shallow.num_replicas, config.deep.num_replicas) == (1, 2)
    assert (config.engine.max_num_seqs, config.engine.flush_rule) == (4, FlushWhen.FULL)


def test_a_finalist_tells_how_far_the_replay_was_off(part: LivePart, tmp_path: Path) -> None:
    setting = {**SETTING, "mode": "free", "exit_threshold": at(part.rows, 0.5)}
    own = Finalist(7, "front-2", setting, compute_of(setting, part.rows.source.exit_cost))
    found = run_finalist(InProcess(STUDY), own, [part])
    rows = {row["figure"]: row for row in found.errors()}
    assert list(rows) == ["exit_rate", "quality", "budget", "tpot_ms", "speedup"]
    for row in rows.values():
        assert row["difference"] == row["replay"] - row["live"]
        assert row["ci_low"] <= row["live"] <= row["ci_high"]
        assert (row["point"], row["trial"], row["data"]) == ("front-2", 7, "t.parquet")
    assert found.measured()["live_agreement"] == round(rows["quality"]["live"], 4)
    write_whole(tmp_path / "f.json", dataclasses.asdict(found))
    assert read_verified(tmp_path / "f.json", own) == found


def test_live_requests_are_the_traced_ones(folder: Path, traces: Traces, part: LivePart) -> None:
    rows = read_rows(folder / "t.parquet")
    held_out = {traces.rest[0].requests[group] for group in np.unique(traces.rest[0].groups)}
    assert len(held_out) == 11
    lines = sorted(int(name) for name in held_out)[:10]
    names = {part.rows.requests[group] for group in np.unique(part.rows.groups)}
    assert names == {str(line) for line in lines}
    assert len(first_tokens(rows, 3)) == 3 * rows.num_requests
    other = [[(5,) * (3 + line) for line in range(40)]]
    with pytest.raises(ConfigError, match=r"live.prompts: p.jsonl: prompt \d+ has .* t.parquet"):
        live_parts(STUDY, other, traces.held_out)
    with pytest.raises(ConfigError, match="no such prompt"):
        live_parts(STUDY, [other[0][:1]], traces.held_out)


def test_a_trace_without_numbered_requests_runs_nothing_live(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.parquet")  # r0, r1, ...
    with pytest.raises(ConfigError, match="its requests have no numbers"):
        live_parts(STUDY, [[(1, 2)]], read_traces(STUDY, tmp_path).held_out)


def test_another_engine_than_the_traced_one_is_refused(part: LivePart) -> None:
    source = dataclasses.replace(part.rows.source, weights_digest="other")
    changed = dataclasses.replace(part, rows=dataclasses.replace(part.rows, source=source))
    with pytest.raises(ConfigError, match=r"another model than the traces.*'other'"):
        InProcess(STUDY).run({**SETTING, "exit_threshold": 0.5}, [changed], compute=FULL)


BODY: dict[str, Any] = {"traces": ["a.parquet"], "live": {"prompts": ["a.jsonl"]}}
EXITS = {"a": {"traces": ["a.parquet"]}, "b": {"traces": ["b.parquet"], "adapter": "./b"}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"live": {"prompts": "a.jsonl"}}, ["live.prompts", "'a.jsonl'", "list"]),
        ({"live": {"prompts": ["a.jsonl", "b.jsonl"]}}, ["live.prompts", "2 files", "1 traces"]),
        ({"live": {"prompts": ["a.jsonl"], "requests": 1}}, ["live.requests", "at least 2", "1"]),
        ({"live": {"new_tokens": 2.5}}, ["live.new_tokens", "integer", "2.5"]),
        ({"live": {"prompt": []}}, ["live.prompt", "unknown setting"]),
        ({"finalists": -1}, ["finalists", "at least 0", "-1"]),
        ({"evaluate": "both"}, ["evaluate", "replay, live, served", "'both'"]),
        ({"evaluate": "served", "live": {}}, ["live.prompts", "evaluate: served"]),
        ({"evaluate": "served", "space": {"threads": 2}},
         ["space.threads", "left out", "2", "live.cpus"]),
        ({"evaluate": "live", "space": {"replica_ratio": ["1:1", "2:1"]}},
         ["space.replica_ratio", "several", "evaluate: served"]),
        ({"space": {"replica_ratio": "0:1"}}, ["space.replica_ratio", "'0:1'", "fused"]),
        ({"space": {"replica_ratio": ["1:1", "1:65"]}}, ["space.replica_ratio", "64", "'1:65'"]),
        ({"space": {"replica_ratio": 121}}, ["space.replica_ratio", "121", 'quotes, "2:1"']),
        ({"live": {"cpus": 0}}, ["live.cpus", "above 0", "0"]),
        ({"live": {"cpus": 5000}}, ["live.cpus", "at most 4096", "5000"]),
        ({"space": {"flush_rule": ["rate", "late"]}}, ["space.flush_rule", "rate, full", "'late'"]),
        ({"space": {"flush_rule": ["rate", "full"]}}, ["space.flush_rule", "evaluate: live"]),
        ({"evaluate": "live", "live": {}}, ["live.prompts", "evaluate: live"]),
        ({"objectives": ["throughput"]}, ["objectives", "throughput", "evaluate: live"]),
        ({"space": {"threads": [1, 2]}}, ["space.threads", "several", "evaluate: live"]),
        ({"space": {"threads": 0}}, ["space.threads", "[1, 1024]", "0"]),
        ({"space": {"pause_drafting": "no"}}, ["space.pause_drafting", "true, false", "'no'"]),
        ({"evaluate": "live", "space": {"max_num_batched_tokens": [8, 64]}},
         ["space.max_num_batched_tokens", "max_stack (8)", "got 8"]),
        ({"evaluate": "live", "scheduler": "asha", "objectives": ["tpot"]},
         ["scheduler asha", "evaluate: replay"]),
        ({"exits": EXITS}, ["traces", "exits has its own"]),
        ({"exits": {"a": 3}}, ["exits.a", "3", "{traces: [FILE]"]),
        ({"exits": ["a"]}, ["exits", "mapping", "['a']"]),
        ({"exits": {"a": {"traces": []}}, "traces": []}, ["exits.a.traces", "[]"]),
        ({"exits": {"a": {"traces": ["t"], "layer": 3}}}, ["exits.a.layer", "unknown setting"]),
        ({"exits": {**EXITS, "c": {"traces": ["c", "d"]}}, "traces": []},
         ["exits", "{'a': 1, 'b': 1, 'c': 2}"]),
    ],
)  # fmt: skip
def test_errors_name_field_value_and_remedy(
    tmp_path: Path, fields: dict[str, Any], words: list[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**BODY, **fields}))
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    for word in ("mine.yaml", *words):
        assert word in str(caught.value)


def test_exits_are_a_dimension_with_rows_of_their_own(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.parquet", scale=4)
    write_trace(tmp_path / "b.parquet", scale=2, adapter="other", adapter_digest="adapter-2")
    study = Study(name="s", exits={"a": Exit(("a.parquet",)), "b": Exit(("b.parquet",))})
    study.validate()
    assert study.names("budget")[0] == "exit"
    assert study.dimensions()["exit"].values == ("a", "b")
    found = read_traces(study, tmp_path)
    assert [rows.exit for rows in found.choose] == ["a", "b"]
    setting = {**SETTING, "mode": "free", "exit_threshold": 0.5}
    for name in "ab":
        alone = read_traces(Study(name="s", traces=(f"{name}.parquet",)), tmp_path)
        both = evaluate({**setting, "exit": name}, found.parts)
        assert both == evaluate(setting, alone.parts)
    # Two exits under one name are refused; another model is, whatever its name.
    with pytest.raises(ConfigError, match=r"another adapter.*under exits"):
        read_traces(Study(name="s", traces=("a.parquet", "b.parquet")), tmp_path)
    write_trace(tmp_path / "b.parquet", weights_digest="weights-2")
    with pytest.raises(ConfigError, match=r"another model.*exits of a study"):
        read_traces(study, tmp_path)
