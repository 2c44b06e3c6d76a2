"""A study in MLflow: one run for it, one below that for each trial."""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import fathom
from fathom import __version__
from fathom.training.tracking import Tracker, flatten
from fathom.tuning.ledger import Trial
from fathom.tuning.study import Study
from fathom.tuning.study_points import front, volume
from fathom.tuning.study_traces import Traces

if TYPE_CHECKING:
    from fathom.tuning.finalists import Verified

EXPERIMENT = "fathom-tune"


class StudyRuns:
    """The runs of a study, which an interrupted one goes on with.

    Args:
        file: the study's. uri: of the tracking server; empty takes SQLite in ``work_dir``.
    """

    def __init__(self, study: Study, file: Path, traces: Traces, work_dir: Path, uri: str) -> None:
        self._study = study
        self._tracker = Tracker(
            work_dir,
            name=study.name,
            params=_params(study),
            uri=uri,
            experiment=EXPERIMENT,
            tags=_tags(file, traces),
        )
        self.run_id = self._tracker.run_id
        self._known = self._tracker.children()
        self._tracker.keep_file(file)
        self._tracker.add_datasets(_datasets(traces), "tuning")

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
            violations = trial.figures.violations(self._study)
            figures = {
                **asdict(trial.figures),
                **{f"violation.{name}": value for name, value in violations.items()},
                "seconds": trial.seconds,
            }
            tags = {"fathom.trial": str(trial.number)}
            if trial.rung is not None:
                tags["fathom.stopped_at_rung"] = str(trial.rung)
            self._tracker.add_child(name, trial.setting, figures, known, tags)

    def add_live(self, found: Verified) -> None:
        """Note a finalist's live run, with what the replay foretold of it."""
        name = f"live-{found.trial:05d}"
        known = self._known.get(name)
        if known is not None and known.info.status == "FINISHED":
            return
        figures = {"seconds": found.seconds}
        for row in found.errors():
            at = row["figure"] if len(found.data) == 1 else f"{row['figure']}.{row['data']}"
            for part in ("live", "replay", "difference", "ci_low", "ci_high"):
                figures[f"{part}.{at}"] = row[part]
        tags = {"fathom.trial": str(found.trial), "fathom.point": found.point}
        self._tracker.add_child(name, found.setting, figures, known, tags)

    def add_baseline(self, baseline: Mapping[str, Any]) -> None:
        """Note what the finalists were compared with; see ``fathom.tuning.baseline``."""
        if "missing" in baseline:
            self._tracker.tag("fathom.baseline", f"missing: {baseline['missing']}"[:1000])
            return
        self._tracker.tag("fathom.baseline", baseline["name"])
        if not self._tracker.has("baseline_tokens_per_s"):
            names = ("tpot_ms", "tokens_per_s")
            figures = {f"baseline_{n}": baseline[n] for n in names if baseline[n] is not None}
            self._tracker.log(0, figures)

    def finish(
        self, trials: Sequence[Trial], files: Sequence[Path], figures: Sequence[Path]
    ) -> None:
        """Note the study's own figures, hypervolume trial by trial, and keep files and diagrams."""
        for file in files:
            self._tracker.keep_file(file)
        for file in figures:
            self._tracker.keep_file(file, "figures")
        if self._tracker.has("front_size"):  # the last of them
            return
        there = self._tracker.steps("hypervolume")  # of one that was killed between two batches
        best: list[Trial] = []
        for step, trial in enumerate(trials, 1):
            best = front(self._study, [*best, trial])
            if step not in there:
                self._tracker.log(step, {"hypervolume": volume(self._study, best)})
        stopped = sum(trial.rung is not None for trial in trials)
        counts = {"trials": len(trials), "trials_stopped": stopped, "front_size": len(best)}
        self._tracker.log(len(trials), counts)


def _tags(file: Path, traces: Traces) -> dict[str, str]:
    """What a run must say of where it comes from."""
    source = traces.choose[0].source
    tags = {
        "mlflow.source.name": "fathom tune",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": getpass.getuser(),
        "fathom.version": __version__,
        "fathom.model": source.model,
        "fathom.weights_digest": source.weights_digest,
        "fathom.adapter": source.adapter,
        "fathom.adapter_digest": source.adapter_digest,
        **_git("mlflow.source.git", Path(fathom.__file__)),
        **_git("fathom.study.git", file.resolve()),
    }
    for path, sha256 in zip(traces.paths, traces.digests, strict=True):
        tags[f"fathom.trace.{path.name}"] = sha256
    return tags


def _git(prefix: str, file: Path) -> dict[str, str]:
    """The commit that a file is of, and whether any tracked file differs from it; nothing where
    git does not know the file, such as that of an installed package.
    """

    def ask(*words: str) -> str | None:
        command = ["git", "-C", str(file.parent), *words]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else None

    if shutil.which("git") is None or ask("ls-files", "--error-unmatch", file.name) is None:
        return {}
    commit, changed = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "-uno")
    return {f"{prefix}.commit": commit or "", f"{prefix}.dirty": str(bool(changed)).lower()}


def _params(study: Study) -> dict[str, Any]:
    """The study's fields in words: lists by commas, what is not set left out."""
    found = {}
    for name, value in flatten(study.as_dict()).items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(str(each) for each in value)
        if value is not None and value != "":
            found[name] = value
    return found


def _datasets(traces: Traces) -> list[Any]:
    """The traces as MLflow notes data sets; its digests have 36 characters, so ours are cut."""
    from mlflow.entities import Dataset

    found = []
    parts = zip(traces.paths, traces.digests, traces.choose, traces.rest, strict=True)
    for path, sha256, choose, rest in parts:
        profile = {
            "num_rows": len(choose) + len(rest),
            "replayed_rows": len(choose),
            "replayed_requests": choose.num_requests,
            "held_out_rows": len(rest),
            "held_out_requests": rest.num_requests,
            "model": choose.source.model,
            "weights_digest": choose.source.weights_digest,
            "adapter_digest": choose.source.adapter_digest,
            "exit_layer": choose.source.exit_layer,
            "sha256": sha256,
        }
        found.append(
            Dataset(
                name=path.name,
                digest=sha256[:36],
                source_type="local",
                source=json.dumps({"uri": str(path.resolve())}),
                profile=json.dumps(profile),
            )
        )
    return found
