"""A study's search by Ray Tune: settings are proposed here, and replayed on Ray's workers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import ray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from fathom.tuning import asha
from fathom.tuning.asha import Parts
from fathom.tuning.ledger import Ledger, Trial
from fathom.tuning.objective import Figures, evaluate
from fathom.tuning.space import Dimension, Setting
from fathom.tuning.study import Scheduler, Searcher, Study

if TYPE_CHECKING:
    from fathom.tuning.runner import LiveTrials

OnTrials = Callable[[Sequence[Trial]], None]

_POLL_S = 0.5


class SearchError(RuntimeError):
    """A search that ended before all its trials were done."""


def search(
    study: Study,
    parts: Parts,
    work_dir: Path,
    *,
    parallel: int = 0,
    live: LiveTrials | None = None,
    on_trials: OnTrials,
) -> list[Trial]:
    """Run the trials that are not done yet; returns all of them, by number.

    A trial that was begun when an earlier search was killed comes first, with its own setting. Ray
    must be up. With more than one trial at a time, what Optuna proposes depends on which ends
    first.

    Args:
        parts: see ``evaluate``. work_dir: holds the trials' files; the same for all workers.
        parallel: most trials at a time; 0: as many as there are cores for.
        live: of a study that is evaluated live.
        on_trials: is told of trials that are done, in groups, from another thread.

    Raises:
        SearchError: naming the first trial that failed, or saying that the search was interrupted.
    """
    ledger = Ledger(work_dir / "trials")
    done = ledger.done()
    if len(done) < study.total:
        follower = _Follower(ledger, on_trials)
        with follower:
            failed = _run(study, parts, work_dir, ledger, done, parallel, live)
        done = ledger.done()
        if len(done) < study.total:
            why = f": {failed}" if failed else " before its end"
            raise SearchError(
                f"the search stopped with {len(done)} of {study.total} trials done{why}. The same "
                "command goes on from there."
            )
    else:
        on_trials(done)
    return done


def _run(
    study: Study,
    parts: Parts,
    work_dir: Path,
    ledger: Ledger,
    done: list[Trial],
    parallel: int,
    live: LiveTrials | None,
) -> str:
    """Run what is left; returns the first error's last line, or nothing."""
    # Each trial would get files of three loggers else; the ledger is the record.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # The newer output prints a banner whatever `verbose` says; progress is ours to show.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    objectives = list(study.objectives)
    folder = str((work_dir / "trials").resolve())
    levels = asha.rungs(study, parts)
    trainable = tune.with_parameters(_Worker, study=study, rungs=levels, live=live, folder=folder)
    tuner = tune.Tuner(
        tune.with_resources(trainable, _room(live) if live else {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=_Search(
                study,
                ledger,
                _Propose(study, ledger),
                metric=objectives,
                mode=["min"] * len(objectives),
                sampler=_sampler(study, len(ledger.begun())),
                storage=_prepared(study, ledger, done),
                study_name=study.name,
            ),
            scheduler=asha.scheduler(study, len(levels), [ledger.climbed(trial) for trial in done]),
            num_samples=study.total - len(done),
            max_concurrent_trials=_at_once(parallel, live),
            # An engine's threads are its process's.
            reuse_actors=live is None or study.space.dimensions()["threads"].single,
        ),
        run_config=tune.RunConfig(
            name=f"{study.name}-{time.time_ns()}",
            storage_path=str(work_dir.resolve() / "ray"),
            verbose=0,
        ),
    )
    errors = tuner.fit().errors
    return str(errors[0]).strip().splitlines()[-1] if errors else ""


def _room(live: LiveTrials) -> Callable[[Mapping[str, Any]], tune.PlacementGroupFactory]:
    """What a live trial reserves, by its setting."""
    runner = live.runner
    return lambda config: tune.PlacementGroupFactory([runner.resources(config)])


def _at_once(parallel: int, live: LiveTrials | None) -> int:
    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most = parallel or max(1, int(resources.get("CPU", 1)))
    return min(most, live.runner.at_once) if live and live.runner.at_once else most


class _Worker(tune.Trainable):
    """One trial after the other, in a worker that keeps the traces."""

    def setup(self, config: dict[str, Any], **fixed: Any) -> None:
        self._study: Study = fixed["study"]
        self._rungs: Sequence[Parts] = fixed["rungs"]
        self._live: LiveTrials | None = fixed["live"]
        self._ledger = Ledger(Path(fixed["folder"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        """Measure the trial at the next rung, unless the ledger has it.

        A trial that was killed climbs again.
        """
        setting = {**self.config}
        number = setting.pop("number")
        level = self.iteration
        top = level + 1 == len(self._rungs)
        # A killed search's worker may have come to its end meanwhile.
        trial = self._ledger.result(number) if top else self._ledger.at_rung(number, level)
        if trial is None:
            start = time.perf_counter()
            below = self._ledger.at_rung(number, level - 1) if level else None
            figures = self._measure(setting, self._rungs[level])
            seconds = time.perf_counter() - start + (below.seconds if below else 0.0)
            trial = Trial(number, setting, figures, seconds, None if top else level)
            if top:
                self._ledger.finish(trial)
            else:
                self._ledger.note(trial)
        losses = trial.figures.losses(self._study)
        named = dict(zip(self._study.objectives, losses, strict=True))
        if self._study.scheduler is Scheduler.ASHA:
            named[asha.SHARE] = self._study.asha.reduction_factor**level
            named[asha.STANDING] = asha.standing(self._study, trial.figures)
        return {**named, "trial": trial, "done": top}

    def _measure(self, setting: Setting, parts: Parts) -> Figures:
        if self._live is None:
            return evaluate(setting, parts)
        return self._live.run(setting)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial has nothing to go on from: it is run again, or done."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See ``save_checkpoint``."""


class _Propose:
    """What Optuna calls for a new setting (define-by-run)."""

    def __init__(self, study: Study, ledger: Ledger) -> None:
        self._study = study
        self._dimensions = study.dimensions()
        self._ledger = ledger

    def __call__(self, trial: Any) -> dict[str, Any]:
        # What else there is to choose depends on the policy.
        policy = _suggest(trial, "policy", self._dimensions["policy"])
        setting: Setting = {"policy": policy}
        for name in self._study.names(policy):
            if name not in setting:
                setting[name] = _suggest(trial, name, self._dimensions[name])
        number = trial.user_attrs.get("number")
        return {"number": self._ledger.begin(setting) if number is None else number}


class _Search(OptunaSearch):
    """OptunaSearch that says by how much constraints are missed, and which trials were stopped."""

    def __init__(self, study: Study, ledger: Ledger, space: _Propose, **options: Any) -> None:
        self._fathom, self._ledger = study, ledger
        super().__init__(space, **options)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if result:
            trial: Trial = result["trial"]
            known = self._ot_trials[trial_id]
            for name, value in trial.figures.violations(self._fathom).items():
                known.set_constraint(name, value)
            if trial.rung is not None:
                # The scheduler has just stopped it; its figures are not those of all rows.
                self._ledger.finish(trial)
                known.report(*trial.figures.losses(self._fathom), step=trial.rung)
                result = None  # which tells Optuna that it was pruned
        super().on_trial_complete(trial_id, result, error)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.values:
        return CategoricalDistribution(dimension.values)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high))
    return FloatDistribution(dimension.low, dimension.high)


def _suggest(trial: Any, name: str, dimension: Dimension) -> Any:
    if dimension.values:
        return trial.suggest_categorical(name, dimension.values)
    if dimension.integer:
        return trial.suggest_int(name, int(dimension.low), int(dimension.high))
    return trial.suggest_float(name, dimension.low, dimension.high)


def _sampler(study: Study, begun: int) -> optuna.samplers.BaseSampler:
    # A resumed search must not draw what it drew before.
    seed = int(np.random.SeedSequence([study.seed, begun]).generate_state(1)[0])
    if study.searcher is Searcher.OPTUNA:
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _prepared(
    study: Study, ledger: Ledger, done: Sequence[Trial]
) -> optuna.storages.InMemoryStorage:
    """Optuna's storage with the trials that are done, and those that must come next."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    own = optuna.create_study(
        storage=storage, study_name=study.name, directions=["minimize"] * len(study.objectives)
    )
    dimensions = study.dimensions()
    for trial in done:
        losses = trial.figures.losses(study)
        at_rungs = {} if trial.rung is None else {trial.rung: losses[0]}
        known = optuna.trial.create_trial(
            state=TrialState.PRUNED if at_rungs else TrialState.COMPLETE,
            params=trial.setting,
            distributions={name: _distribution(dimensions[name]) for name in trial.setting},
            values=losses,
            intermediate_values=at_rungs,
        )
        for name, value in trial.figures.violations(study).items():
            known.set_constraint(name, value)
        own.add_trial(known)
    finished = {trial.number for trial in done}
    begun = ledger.begun()
    for number, setting in begun.items():
        if number not in finished:
            own.enqueue_trial(setting, user_attrs={"number": number})
    if study.searcher is Searcher.GRID:
        for setting in list(study.grid())[len(begun) :]:
            own.enqueue_trial(setting)
    return storage


class _Follower:
    """Tells of trials as their files appear."""

    def __init__(self, ledger: Ledger, on_trials: OnTrials) -> None:
        self._ledger, self._on_trials = ledger, on_trials
        self._told: frozenset[int] = frozenset()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name="fathom-tune", daemon=True)

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is None:
            self._tell()
        elif error[0] is None:
            raise self._failure

    def _follow(self) -> None:
        try:
            while not self._stop.wait(_POLL_S):
                self._tell()
        except BaseException as failure:  # it is raised where the search is waited for
            self._failure = failure

    def _tell(self) -> None:
        new = self._ledger.done(self._told)
        if new:
            self._on_trials(new)
            self._told |= {trial.number for trial in new}
