"""A study in MLflow: one run for it, one below that for each trial."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from fathom import __version__
from fathom.training.tracking import Tracker
from fathom.tuning.ledger import Trial
from fathom.tuning.study import Study
from fathom.tuning.study_points import front, volume
from fathom.tuning.study_traces import Traces

EXPERIMENT = "fathom-tune"


class StudyRuns:
    """The runs of a study, which an interrupted one goes on with.

    Args:
        file: the study's. uri: of the tracking server; empty takes SQLite in ``work_dir``.
    """

    def __init__(self, study: Study, file: Path, traces: Traces, work_dir: Path, uri: str) -> None:
        self._study = study
        params: dict[str, Any] = study.as_dict()
        self._tracker = Tracker(
            work_dir,
            name=study.name,
            params=params,
            uri=uri,
            experiment=EXPERIMENT,
            tags=_tags(file, traces),
        )
        self.run_id = self._tracker.run_id
        self._known = self._tracker.children()
        self._tracker.keep_file(file)

    def __enter__(self) -> StudyRuns:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tracker.__exit__(kind, error, trace)

    def add(self, trials: Sequence[Trial]) -> None:
        """Note trials that are done; those that are there already are left as they are."""
        for trial in trials:
            name = f"trial-{trial.number:05d}"
            known = self._known.get(name)
            if known is not None and known.info.status == "FINISHED":
                continue
            figures = {
                **asdict(trial.figures),
                **{f"violation.{k}": v for k, v in trial.figures.violations(self._study).items()},
                "seconds": trial.seconds,
            }
            self._tracker.add_child(name, trial.setting, figures, known)

    def finish(self, trials: Sequence[Trial], files: Sequence[Path]) -> None:
        """Note the study's own figures, hypervolume trial by trial, and keep files."""
        for file in files:
            self._tracker.keep_file(file)
        if self._tracker.has("hypervolume"):
            return
        best: list[Trial] = []
        for step, trial in enumerate(trials, 1):
            best = front(self._study, [*best, trial])
            self._tracker.log(step, {"hypervolume": volume(self._study, best)})
        self._tracker.log(len(trials), {"trials": len(trials)})


def _tags(file: Path, traces: Traces) -> dict[str, str]:
    """What a run must say of where it comes from."""
    source = traces.choose[0].source
    tags = {
        "fathom.version": __version__,
        "fathom.model": source.model,
        "fathom.weights_digest": source.weights_digest,
        "fathom.adapter": source.adapter,
        "fathom.adapter_digest": source.adapter_digest,
    }
    for path, sha256 in zip(traces.paths, traces.digests, strict=True):
        tags[f"fathom.trace.{path.name}"] = sha256
    found = subprocess.run(
        ["git", "-C", str(file.resolve().parent), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode == 0:
        tags["mlflow.source.git.commit"] = found.stdout.strip()
    return tags
