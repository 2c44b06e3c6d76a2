"""Points of a study's front, run live on Ray's workers, beside what the replay foretold."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from fathom.compute import ComputePolicy
from fathom.tuning.ledger import Trial, write_whole
from fathom.tuning.live_figures import LiveFigures
from fathom.tuning.live_parts import LivePart
from fathom.tuning.objective import Figures
from fathom.tuning.operating_points import OperatingPoints
from fathom.tuning.rows import SAME
from fathom.tuning.runner import Runner, filled, run_full
from fathom.tuning.space import Setting
from fathom.tuning.study import Study
from fathom.tuning.study_live import ONLY
from fathom.tuning.study_points import point_names, spanning

FIGURES = ("exit_rate", "quality", "budget", "tpot_ms", "speedup")


class FinalistError(RuntimeError):
    """A finalist that could not be run live."""


@dataclass(frozen=True, slots=True)
class Finalist:
    """A point that is to be run live."""

    trial: int
    point: str
    setting: Setting
    compute: ComputePolicy


@dataclass(frozen=True, slots=True)
class Verified:
    """A finalist that has been run.

    Attributes:
        data: names of the traces, one for each of the next two. replay: what the trace foretells
            of the same requests and tokens; see ``LiveRun.replay``. live: what the engine gave.
        seconds: that it took.
    """

    trial: int
    point: str
    setting: Setting
    data: list[str]
    replay: list[Figures]
    live: list[LiveFigures]
    seconds: float

    def measured(self) -> dict[str, float]:
        """What an operating point's ``measured`` has of it, mean over the data sets."""
        found = {
            "live_agreement": _mean(each.quality.value for each in self.live),
            "live_exit_rate": _mean(each.exit_rate.value for each in self.live),
            "live_budget": _mean(each.budget.value for each in self.live),
            "live_tpot_ms": _mean(each.tpot_ms.value for each in self.live),
            "live_speedup": _mean(each.speedup.value for each in self.live),
            "live_tokens_per_s": _mean(each.tokens_per_s for each in self.live),
            "live_requests": sum(each.requests for each in self.live),
            "live_tokens": sum(each.tokens for each in self.live),
        }
        return {name: round(value, 4) for name, value in found.items() if value is not None}

    def errors(self) -> list[dict[str, Any]]:
        """Rows of the replay's error: ``point``, ``trial``, ``data``, ``figure``, ``replay``,
        ``live``, ``difference`` (replay less live), and ``ci_low`` and ``ci_high`` of ``live``, 95%
        over requests.
        """
        rows = []
        for data, foretold, live in zip(self.data, self.replay, self.live, strict=True):
            for name in FIGURES:
                if name == "speedup":
                    value = foretold.full_tpot_ms / foretold.tpot_ms
                else:
                    value = getattr(foretold, name)
                found = getattr(live, name)
                if found.value is None:
                    continue
                rows.append(
                    {
                        "point": self.point,
                        "trial": self.trial,
                        "data": data,
                        "figure": name,
                        "replay": value,
                        "live": found.value,
                        "difference": value - found.value,
                        "ci_low": found.low,
                        "ci_high": found.high,
                    }
                )
        return rows


def finalists(
    study: Study, trials: Sequence[Trial], points: Mapping[str, OperatingPoints]
) -> list[Finalist]:
    """The points that span the front best, as many as the study wants, in the front's order.

    Args:
        points: by exit; see ``make_points``.
    """
    names = point_names(study, trials)
    kept = [trial for trial in trials if trial.number in names]
    found = spanning(replace(study, max_points=study.finalists), kept) if study.finalists else []
    return sorted(
        (
            Finalist(
                trial.number,
                names[trial.number],
                trial.setting,
                points[trial.setting.get("exit", ONLY)].points[names[trial.number]].compute,
            )
            for trial in found
        ),
        key=lambda each: int(each.point.rpartition("-")[2]),
    )


def verify(
    runner: Runner,
    wanted: Sequence[Finalist],
    parts: Sequence[LivePart],
    folder: Path,
    *,
    parallel: int = 0,
    on_done: Callable[[Verified], None],
) -> list[Verified]:
    """Run finalists live, those that ``folder`` does not have yet; returns all, in their order.

    Each is a task of Ray's that reserves what the runner says; Ray must be up.

    Args:
        parts: of held-out requests, of all exits.
        folder: keeps what is done, by what it depends on.
        parallel: most at a time; 0: as many as there are cores for.
        on_done: is told of each, also of those that were done before.

    Raises:
        FinalistError: naming the first that failed; what is done is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {each.point: folder / f"{_key(runner.study, each, parts)}.json" for each in wanted}
    done: dict[str, Verified] = {}
    waiting: list[Finalist] = []
    for each in wanted:
        if files[each.point].exists():
            done[each.point] = read_verified(files[each.point], each)
            on_done(done[each.point])
        else:
            waiting.append(each)
    if waiting:
        check_cores(max(runner.resources(each.setting)["CPU"] for each in waiting))
        parallel = min(filter(None, (parallel, runner.at_once)), default=0)
        _run_all(runner, waiting, parts, files, done, parallel, on_done)
    return [done[each.point] for each in wanted]


def _run_all(
    runner: Runner,
    waiting: list[Finalist],
    parts: Sequence[LivePart],
    files: Mapping[str, Path],
    done: dict[str, Verified],
    parallel: int,
    on_done: Callable[[Verified], None],
) -> None:
    task = ray.remote(run_finalist)
    shared: Any = ray.put(list(parts))
    running: dict[Any, Finalist] = {}
    try:
        while waiting or running:
            while waiting and (not parallel or len(running) < parallel):
                each = waiting.pop(0)
                own = task.options(**task_options(runner, each.setting))
                running[own.remote(runner, each, shared)] = each
            ready, _ = ray.wait(list(running))
            each = running.pop(ready[0])
            try:
                found: Verified = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                why = str(error).strip().splitlines()[-1]
                raise FinalistError(
                    f"{each.point} (trial {each.trial}) could not be run live: {why}. The same "
                    "command goes on from there."
                ) from error
            write_whole(files[each.point], asdict(found))
            done[each.point] = found
            on_done(found)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def full_figures(runner: Runner, parts: Sequence[LivePart], folder: Path) -> Figures:
    """What live trials are compared with (``run_full``), as a task of Ray's, once.

    Args:
        folder: keeps it.
    """
    path = folder / "full.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        threads = runner.study.space.dimensions()["threads"]
        most = max(threads.values or (int(threads.high),))
        check_cores(runner.resources({"threads": most})["CPU"])
        task = ray.remote(run_full).options(**task_options(runner, {}))
        try:
            found: Figures = ray.get(task.remote(runner, list(parts)))
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[-1]
            raise FinalistError(f"mode full could not be run live: {why}") from error
        write_whole(path, asdict(found))
    return Figures(**json.loads(path.read_text()))


def run_finalist(runner: Runner, own: Finalist, parts: Sequence[LivePart]) -> Verified:
    """Run one, here; see ``Verified``."""
    start = time.perf_counter()
    runs = runner.run(own.setting, parts, compute=own.compute)
    return Verified(
        trial=own.trial,
        point=own.point,
        setting=own.setting,
        data=[run.part.rows.name for run in runs],
        replay=[run.replay(own.setting) for run in runs],
        live=[run.figures for run in runs],
        seconds=time.perf_counter() - start,
    )


def read_verified(path: Path, own: Finalist) -> Verified:
    """What ``verify`` has kept; a point may have another name now."""
    body = json.loads(path.read_text())
    return Verified(
        **{
            **body,
            "point": own.point,
            "trial": own.trial,
            "replay": [Figures(**each) for each in body["replay"]],
            "live": [LiveFigures.from_dict(each) for each in body["live"]],
        }
    )


def check_cores(threads: float) -> None:
    """Check that the cluster can ever place an engine of so many threads.

    Raises:
        FinalistError: if it cannot: the task would wait for good.
    """
    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if threads > (cores := int(resources.get("CPU", 0))):
        raise FinalistError(
            f"space.threads {threads} is more than the {cores} cores of the cluster: lower it."
        )


def task_options(runner: Runner, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a task of Ray's that runs a setting."""
    own = dict(runner.resources(setting))
    return {"num_cpus": own.pop("CPU"), "resources": own, "max_retries": 0}


def _key(study: Study, own: Finalist, parts: Sequence[LivePart]) -> str:
    """Of everything that a finalist's figures depend on."""
    text = json.dumps(
        {
            "setting": own.setting,
            "compute": {**asdict(own.compute), "operating_point": ""},
            "evaluate": study.evaluate if study.is_served else "live",
            "engine": filled(study, own.setting),
            "cpus": study.live.cpus if study.is_served else 0,
            "new_tokens": study.live.new_tokens,
            "prompts": [
                (part.rows.name, [getattr(part.rows.source, key) for key, _ in SAME], part.prompts)
                for part in parts
                if part.rows.exit == own.setting.get("exit", ONLY)
            ],
        },
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _mean(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
