"""Which study may go on in a work folder of ``fathom tune``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fathom.commands.options import UsageError
from fathom.commands.tune_folder import claim
from fathom.tuning.space import Space
from fathom.tuning.study import Study
from fathom.tuning.study_live import Baseline, Evaluation, Exit, Live
from fathom.tuning.study_traces import Traces, read_traces
from tests.traces import write_trace

STUDY = Study(name="small", traces=("t.parquet",), space=Space(mode=("exact",)))


@pytest.fixture
def traces(tmp_path: Path) -> Traces:
    write_trace(tmp_path / "t.parquet", requests=4)
    return read_traces(STUDY, tmp_path)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads((folder / "study.json").read_text())
    change(body)
    (folder / "study.json").write_text(json.dumps(body))


def without(*names: str) -> Callable[[dict[str, Any]], object]:
    """What a library would have written that did not know a field: the last of the names."""

    def change(body: dict[str, Any]) -> None:
        for name in names[:-1]:
            body = body[name]
        del body[names[-1]]

    return change


FIELDS = [
    ("space", "replica_ratio"), ("space", "exit_threshold"), ("live", "cpus"), ("asha",),
    ("constraints", "max_tpot_ms"), ("max_points",), ("exits",),
]  # fmt: skip


@pytest.mark.parametrize("names", FIELDS, ids=".".join)
def test_a_study_goes_on_where_a_field_was_not_known(
    tmp_path: Path, traces: Traces, names: tuple[str, ...]
) -> None:
    study = replace(STUDY, evaluate=Evaluation.LIVE, live=Live(prompts=("p.jsonl",)))
    claim(tmp_path, study, traces)
    whole = (tmp_path / "study.json").read_text()
    edit(tmp_path, without(*names))
    claim(tmp_path, study, traces)
    assert (tmp_path / "study.json").read_text() == whole


def test_exits_go_on_too(tmp_path: Path, traces: Traces) -> None:
    study = Study(name="small", exits={"early": Exit(traces=("t.parquet",))})
    claim(tmp_path, study, traces)
    edit(tmp_path, without("exits", "early", "adapter"))
    claim(tmp_path, study, traces)
    named = replace(study, exits={"early": Exit(traces=("t.parquet",), adapter="./here")})
    with pytest.raises(UsageError, match="a study whose exits is"):
        claim(tmp_path, named, traces)


def test_what_is_now_set_otherwise_than_by_default_is_refused(
    tmp_path: Path, traces: Traces
) -> None:
    claim(tmp_path, STUDY, traces)
    edit(tmp_path, without("space", "flush_rule"))
    other = replace(STUDY, space=replace(STUDY.space, flush_rule="eager"))
    with pytest.raises(UsageError, match=r"a study whose space is .*'rate'.*, not .*'eager'"):
        claim(tmp_path, other, traces)


def test_a_baseline_may_come_later(tmp_path: Path, traces: Traces) -> None:
    study = replace(STUDY, evaluate=Evaluation.SERVED, live=Live(prompts=("p.jsonl",)))
    claim(tmp_path, study, traces)
    with_one = replace(study, live=replace(study.live, baseline=Baseline.VLLM))
    claim(tmp_path, with_one, traces)
    assert json.loads((tmp_path / "study.json").read_text())["live"]["baseline"] == "vllm"
    with pytest.raises(UsageError, match="a study whose live is"):
        claim(tmp_path, replace(with_one, live=replace(with_one.live, cpus=4)), traces)


def test_another_study_is_refused(tmp_path: Path, traces: Traces) -> None:
    claim(tmp_path, STUDY, traces)
    before = (tmp_path / "study.json").read_text()
    with pytest.raises(UsageError, match="whose trials is 40, not 41: give another --work-dir"):
        claim(tmp_path, replace(STUDY, trials=41), traces)
    assert (tmp_path / "study.json").read_text() == before
