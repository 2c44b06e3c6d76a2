"""ASHA over rows: its rungs, whom it lets pass, and what a resumed search knows of it."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optuna")

from optuna.trial import TrialState

from fathom.settings import ConfigError
from fathom.tuning import asha
from fathom.tuning.ledger import Ledger, Trial
from fathom.tuning.objective import Figures
from fathom.tuning.rows import TraceRows, read_rows
from fathom.tuning.search import _prepared, _Propose, _sampler, _Search, _Worker
from fathom.tuning.study import Asha, Constraints, Scheduler, Study
from fathom.tuning.study_points import front
from fathom.tuning.study_traces import read_traces
from tests.traces import write_trace

STUDY = Study(
    name="s",
    traces=("a.parquet",),
    objectives=("tpot",),
    constraints=Constraints(max_quality_loss=0.1),
    scheduler=Scheduler.ASHA,
    asha=Asha(first_rows=100, reduction_factor=3),
    trials=12,
)
SETTING = {"mode": "free", "policy": "threshold", "confidence": "softmax_gap", "max_stack": 8}


def figures(tpot_ms: float, quality: float = 1.0) -> Figures:
    return Figures(quality, budget=0.5, tpot_ms=tpot_ms, full_tpot_ms=10.0, exit_rate=0.6)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[TraceRows, TraceRows]]:
    folder = tmp_path_factory.mktemp("traces")
    write_trace(folder / "a.parquet", requests=100, tokens=10, scale=4)
    write_trace(folder / "b.parquet", requests=200, tokens=10, seed=3)
    return [(rows, rows) for rows in (read_rows(folder / n) for n in ("a.parquet", "b.parquet"))]


def test_rungs_are_growing_shares_of_whole_requests(
    parts: list[tuple[TraceRows, TraceRows]],
) -> None:
    found = asha.rungs(STUDY, parts)
    # 1,000 // 9 is still at least 100; a third of 1,000 rows is 33.4 requests of 10.
    assert [[len(rows) for _, rows in level] for level in found] == [
        [120, 230], [340, 670], [1000, 2000],
    ]  # fmt: skip
    for lower, upper in pairwise(found):
        for (_, few), (_, many) in zip(lower, upper, strict=True):
            assert (few.gap == many.gap[: len(few)]).all()
            assert len(few) == 10 * len(np.unique(few.groups))
    none = dataclasses.replace(STUDY, scheduler=Scheduler.NONE)
    assert asha.rungs(none, parts) == [parts]


def test_a_trace_too_short_for_two_rungs_is_refused_before_the_search(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.parquet", requests=20, tokens=10)
    with pytest.raises(ConfigError) as caught:
        read_traces(STUDY, tmp_path)
    for words in ("asha.first_rows 100", "on 100 rows", "lower it to 33"):
        assert words in str(caught.value)


def test_feasible_trials_stand_before_all_others() -> None:
    order = [figures(5), figures(50), figures(9, 0.89), figures(1, 0.5)]
    places = [asha.standing(STUDY, each) for each in order]
    assert places == sorted(places)
    assert places[1] < 1 < places[2]
    assert places[3] == pytest.approx(1 + 4)


def result(level: int, tpot_ms: float) -> dict[str, Any]:
    return {asha.SHARE: 3**level, asha.STANDING: asha.standing(STUDY, figures(tpot_ms))}


def test_a_resumed_scheduler_lets_pass_whom_the_first_would() -> None:
    known = [
        [Trial(n, {}, figures(tpot), 0.1, level) for level in range(2)]
        for n, tpot in enumerate((4.0, 5.0, 6.0, 7.0))
    ]
    decisions = []
    for history in ([], known):
        own = asha.scheduler(STUDY, 3, history)
        assert own is not None
        for name, tpot in (("slow", 8.0), ("fast", 3.0)):
            trial: Any = SimpleNamespace(trial_id=name)
            own.on_trial_add(None, trial)
            decisions.append(own.on_trial_result(None, trial, result(0, tpot)))
    # A new one takes the first for the best; one that knows the others does not.
    assert decisions == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE"]


def replay(parts: list[tuple[TraceRows, TraceRows]], folder: Path, number: int) -> _Worker:
    own = _Worker.__new__(_Worker)
    own._iteration = 0
    own.config = {**SETTING, "exit_threshold": 0.5, "number": number}
    own.setup(
        own.config, study=STUDY, rungs=asha.rungs(STUDY, parts), live=None, folder=str(folder)
    )
    return own


def test_a_trial_climbs_and_repeats_no_rung(
    parts: list[tuple[TraceRows, TraceRows]], tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path)
    number = ledger.begin({**SETTING, "exit_threshold": 0.5})
    first = replay(parts, tmp_path, number)
    found = [first.step()]
    assert found[0]["done"] is False and ledger.done() == []
    # Killed; the next search gives the same trial to another worker.
    again = replay(parts, tmp_path, number)
    written = (tmp_path / "00000.rung-0.json").stat().st_mtime_ns
    climbed = []
    for level in range(3):
        again._iteration = level
        climbed.append(again.step())
    assert climbed[0] == found[0]
    assert (tmp_path / "00000.rung-0.json").stat().st_mtime_ns == written
    assert [each[asha.SHARE] for each in climbed] == [1, 3, 9]
    assert [each["done"] for each in climbed] == [False, False, True]
    assert [each["trial"].rung for each in climbed] == [0, 1, None]
    assert climbed[0]["trial"].figures != climbed[2]["trial"].figures
    seconds = [each["trial"].seconds for each in climbed]
    assert seconds == sorted(seconds)  # of all its replays
    (done,) = ledger.done()
    assert ledger.climbed(done) == [each["trial"] for each in climbed]


def search(ledger: Ledger) -> _Search:
    return _Search(
        STUDY,
        ledger,
        _Propose(STUDY, ledger),
        metric=["tpot"],
        mode=["min"],
        sampler=_sampler(STUDY, len(ledger.begun())),
        storage=_prepared(STUDY, ledger, ledger.done()),
        study_name=STUDY.name,
    )


def test_a_stopped_trial_is_in_the_ledger_and_pruned_in_optuna(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = search(ledger)
    trials = []
    for number, rung in enumerate((None, 0, 1, 0)):
        setting = first.suggest(str(number))
        assert setting is not None
        trial = Trial(setting.pop("number"), setting, figures(4.0 + number), 0.1, rung)
        trials.append(trial)
        if rung is None:
            ledger.finish(trial)  # by its worker
        if number < 3:  # the last was killed between its rung and the scheduler's word
            first.on_trial_complete(str(number), {"tpot": 0.4 + number / 10, "trial": trial})
    assert ledger.done() == trials[:3]
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert [t.state for t in first._ot_study.trials] == [*states, TrialState.RUNNING]

    second = search(Ledger(tmp_path))
    for own in (first, second):
        known = own._ot_study.trials[:3]
        assert [t.state for t in known] == states
        assert [t.intermediate_values for t in known] == [{}, {0: 0.5}, {1: 0.6}]
        assert [t.params for t in known] == [t.setting for t in trials[:3]]
        assert all(t.constraints["max_quality_loss"] == pytest.approx(-0.1) for t in known)
    assert second.suggest("next") == {**trials[3].setting, "number": 3}


def test_what_was_stopped_is_on_no_front() -> None:
    found = [Trial(0, {}, figures(5), 0.1), Trial(1, {}, figures(2), 0.1, rung=1)]
    assert front(STUDY, found) == found[:1]
    assert front(STUDY, found[1:]) == []
