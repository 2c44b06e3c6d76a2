"""What a search proposes, and what a resumed one knows, without the processes of Ray."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from fathom.tuning.ledger import Ledger, Trial
from fathom.tuning.objective import Figures
from fathom.tuning.search import _prepared, _Propose, _sampler, _Search
from fathom.tuning.study import Constraints, Searcher, Space, Study

STUDY = Study(
    name="s",
    traces=("t.parquet",),
    constraints=Constraints(max_quality_loss=0.1),
    space=Space(policy=["threshold", "budget"], max_stack={"low": 1, "high": 8}),
    trials=12,
)


def searcher(study: Study, ledger: Ledger) -> _Search:
    objectives = list(study.objectives)
    return _Search(
        study,
        ledger,
        _Propose(study, ledger),
        metric=objectives,
        mode=["min"] * len(objectives),
        sampler=_sampler(study, len(ledger.begun())),
        storage=_prepared(study, ledger, ledger.done()),
        study_name=study.name,
    )


def propose(search: _Search, name: str) -> tuple[int, dict[str, Any]]:
    setting = search.suggest(name)
    assert setting is not None
    return setting.pop("number"), setting


def finish(study: Study, search: _Search, ledger: Ledger, name: str, number: int) -> Trial:
    setting = ledger.begun()[number]
    quality = 1 - 0.02 * number
    trial = Trial(number, setting, Figures(quality, 0.5, 4.0, 8.0, 0.6), 0.1)
    ledger.finish(trial)
    named = dict(zip(study.objectives, trial.figures.losses(study), strict=True))
    search.on_trial_complete(name, {**named, "trial": trial})
    return trial


def test_a_resumed_search_knows_what_is_done_and_begins_with_what_was_begun(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = searcher(STUDY, ledger)
    proposed = dict(propose(first, f"t{n}") for n in range(8))
    assert list(proposed) == list(range(8)) and ledger.begun() == proposed
    for number in (0, 1, 2, 4, 6, 7):  # 3 and 5 were running when it was killed
        finish(STUDY, first, ledger, f"t{number}", number)

    second = searcher(STUDY, Ledger(tmp_path))
    known = second._ot_study.get_trials(deepcopy=False)
    done = [trial for trial in known if trial.state.is_finished()]
    assert [trial.params for trial in done] == [proposed[n] for n in (0, 1, 2, 4, 6, 7)]
    assert [round(trial.constraints["max_quality_loss"], 6) for trial in done] == [
        round(0.02 * n - 0.1, 6) for n in (0, 1, 2, 4, 6, 7)
    ]
    assert [propose(second, f"u{n}") for n in range(2)] == [(3, proposed[3]), (5, proposed[5])]
    fresh = [propose(second, f"v{n}") for n in range(4)]
    assert [number for number, _ in fresh] == [8, 9, 10, 11]
    # Nothing is drawn again that had been drawn before the kill.
    assert all(setting not in proposed.values() for _, setting in fresh)


def test_constraints_reach_optuna(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    search = searcher(STUDY, ledger)
    for number in range(8):
        propose(search, str(number))
        finish(STUDY, search, ledger, str(number), number)
    # Of equal cost, each loses more than the last: 0 to 5 keep to 0.1, the first dominates.
    assert [t.number for t in search._ot_study.best_trials] == [0]
    feasible = [
        t.number for t in search._ot_study.trials if t.constraints["max_quality_loss"] <= 1e-9
    ]
    assert feasible == [0, 1, 2, 3, 4, 5]


def test_a_grid_is_taken_whole_across_a_kill(tmp_path: Path) -> None:
    study = dataclasses.replace(
        STUDY, searcher=Searcher.GRID, grid_steps=2, trials=100,
        space=Space(policy=["threshold", "budget"], max_stack=[1, 8]),
    )  # fmt: skip
    ledger = Ledger(tmp_path)
    first = searcher(study, ledger)
    for number in range(5):
        propose(first, str(number))
    finish(study, first, ledger, "0", 0)
    second = searcher(study, Ledger(tmp_path))
    for number in range(study.total - 1):
        propose(second, str(number))
    grid = list(study.grid())
    begun = list(Ledger(tmp_path).begun().values())
    assert len(begun) == len(grid) == study.total == 16
    assert all(setting in begun for setting in grid)


def test_the_same_seed_proposes_the_same(tmp_path: Path) -> None:
    drawn = []
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        study = dataclasses.replace(STUDY, seed=seed, searcher=Searcher.RANDOM)
        search = searcher(study, Ledger(tmp_path / place))
        drawn.append([propose(search, str(n)) for n in range(5)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_ray_can_keep_the_searcher(tmp_path: Path) -> None:
    search = searcher(STUDY, Ledger(tmp_path / "trials"))
    propose(search, "a")
    again = pickle.loads(pickle.dumps(search))
    assert propose(again, "b")[0] == 1
