"""Studies that were made: found by what a user calls them, and listed with their fronts."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom import __version__
from fathom.settings import ConfigError
from fathom.training.tracking import Tracker
from fathom.tuning.operating_points import OperatingPoints, load
from fathom.tuning.registry import FILE, Registry, RegistryError, connect, model_name
from fathom.tuning.study_runs import EXPERIMENT

FRONT = "front.json"
_VERSION = "fathom.version"


class NoStudy(ConfigError):
    """A study that is not to be found; the message says where it was looked for."""


class NoPoint(ConfigError):
    """No point of a study keeps to what is asked; the message names the best there is."""


@dataclass(frozen=True, slots=True)
class MadeStudy:
    """A study that was made.

    Attributes:
        folder: its work folder; None if it is elsewhere. uri: of the store with its runs.
        run_id: of its run; empty if it was made without MLflow.
    """

    name: str
    folder: Path | None
    uri: str
    run_id: str

    def points(self) -> OperatingPoints:
        """The operating points of its front, from its folder, else from its run.

        Raises:
            ConfigError: if there are none, or they cannot be used.
        """
        own = self.folder and self.folder / FILE
        if own and own.exists():
            return load(own)
        nothing = (
            f"study {self.name} has no {FILE}: it is not finished, its front is empty, or its "
            "points went elsewhere by --out; run `fathom tune` again."
        )
        if not self.run_id:
            raise ConfigError(nothing)
        with tempfile.TemporaryDirectory(prefix="fathom-study-") as local:
            file = _artifact(connect(self.uri), self.run_id, FILE, local)
            if file is None:
                raise ConfigError(nothing)
            points = load(file)
        return dataclasses.replace(points, path=f"{FILE} of run {self.run_id}")

    def with_run(self) -> MadeStudy:
        """Itself, with a run in MLflow: made now if it has none."""
        if self.run_id:
            return self
        assert self.folder is not None
        own = self.points().identity
        with Tracker(
            self.folder,
            name=self.name,
            params=json.loads((self.folder / "study.json").read_text()),
            uri=self.uri,
            experiment=EXPERIMENT,
            tags={_VERSION: __version__, "fathom.model": own.model, "fathom.adapter": own.adapter},
        ) as tracker:
            for file in (self.folder / FRONT, self.folder / FILE):
                if file.exists():
                    tracker.keep_file(file)
        return dataclasses.replace(self, uri=tracker.uri, run_id=tracker.run_id)


def find_study(study: str, uri: str = "") -> MadeStudy:
    """The study that a user means.

    Args:
        study: its work folder, its name, or the id of its run.
        uri: of its tracking server; empty for the SQLite in its work folder.

    Raises:
        NoStudy: saying where it was looked for. RegistryError: if MLflow does not answer.
    """
    folders = [Path(study), Path(f"tune-{study}")]
    folders += [note.parent for note in Path().glob("tune-*/mlflow_run_id")
                if note.read_text() == study]  # fmt: skip
    for folder in folders:
        if (folder / "study.json").exists():
            return _of_folder(folder, uri)
    looked = (
        f"no study {study!r}: looked for it in the folders {folders[0]} and {folders[1]}, and for "
        "a run of that id in tune-*"
    )
    if not uri:
        raise NoStudy(f"{looked}; give its work folder, or its tracking server by --mlflow.")
    client = connect(uri)
    runs = [run for run in _runs(client, uri) if study in (run.info.run_id, run.info.run_name)]
    if not runs:
        raise NoStudy(f"{looked}, and in experiment {EXPERIMENT} at {uri}.")
    if len(runs) > 1:
        ids = ", ".join(run.info.run_id for run in runs)
        raise NoStudy(f"{len(runs)} studies at {uri} are named {study!r}: give an id of {ids}.")
    return MadeStudy(runs[0].info.run_name, None, uri, runs[0].info.run_id)


def _of_folder(folder: Path, uri: str) -> MadeStudy:
    name = json.loads((folder / "study.json").read_text())["name"]
    note, store = folder / "mlflow_run_id", folder / "mlflow.db"
    run_id = note.read_text() if note.exists() else ""
    if run_id and not uri and not store.exists():
        raise NoStudy(
            f"study {name} in {folder} has its runs on a tracking server: name it by --mlflow."
        )
    return MadeStudy(name, folder, uri or f"sqlite:///{store.resolve()}", run_id)


def pick(points: OperatingPoints, max_quality_loss: float) -> str:
    """The fastest point that loses at most so much quality, by held-out requests.

    Args:
        max_quality_loss: share of tokens that may differ from the full model's.

    Raises:
        NoPoint: naming the best there is.
    """
    losses = {
        name: 1 - point.measured["agreement"]
        for name, point in points.points.items()
        if {"agreement", "predicted_speedup"} <= set(point.measured)
    }
    if not losses:
        raise NoPoint(f"{points.path}: no point has a measured agreement and predicted_speedup.")
    kept = [name for name, loss in losses.items() if loss <= max_quality_loss + 1e-9]
    if not kept:
        best = min(losses, key=lambda name: losses[name])
        raise NoPoint(
            f"no point loses at most {max_quality_loss:g} of quality: the best there is, {best}, "
            f"loses {losses[best]:.4g} (of held-out requests). Allow it by --max-quality-loss "
            f"{losses[best]:.4g}, or search again with a wider space."
        )
    return max(kept, key=lambda n: (points.points[n].measured["predicted_speedup"], -losses[n]))


def list_studies(uri: str, *, most: int = 20) -> list[dict[str, Any]]:
    """Studies, the latest first; all plain.

    Args:
        most: studies that are listed.

    Returns:
        for each ``run_id``, ``experiment_id``, ``study``, ``status`` (MLflow's), ``started`` and
        ``ended`` (seconds since 1970, or None), ``model``, ``adapter``, ``trials`` and
        ``hypervolume`` (or None).

    Raises:
        RegistryError: if MLflow does not answer.
    """
    return [_entry(run) for run in _runs(connect(uri), uri)[:most]]


def describe_study(uri: str, run_id: str) -> dict[str, Any]:
    """A study with its front and what was promoted of it; all plain.

    Returns:
        what ``list_studies`` says, ``front`` (rows as in ``fathom tune --json``), ``figures`` (of
        every trial, by their names), ``digest`` of its points and ``registered_model`` (None
        without points), and ``promoted``: its versions as ``version``, ``uri``, ``point``,
        ``aliases``.

    Raises:
        NoStudy: if there is none. RegistryError: if MLflow does not answer.
    """
    client = connect(uri)
    run = next((each for each in _runs(client, uri) if each.info.run_id == run_id), None)
    if run is None:
        raise NoStudy(f"no run {run_id!r} in experiment {EXPERIMENT} at {uri}.")
    trials = _search(
        client, uri, run.info.experiment_id, f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    return {
        **_entry(run),
        "figures": [dict(trial.data.metrics) for trial in trials],
        **_front(client, Registry(uri), run_id),
    }


def _entry(run: Any) -> dict[str, Any]:
    info, tags, metrics = run.info, run.data.tags, run.data.metrics
    trials = metrics.get("trials")
    return {
        "run_id": info.run_id,
        "experiment_id": info.experiment_id,
        "study": info.run_name,
        "status": info.status,
        "started": info.start_time / 1000,
        "ended": info.end_time and info.end_time / 1000,
        "model": tags.get("fathom.model", ""),
        "adapter": tags.get("fathom.adapter", ""),
        "trials": None if trials is None else int(trials),
        "hypervolume": metrics.get("hypervolume"),
    }


def _front(client: Any, registry: Registry, run_id: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fathom-study-") as local:
        front = _artifact(client, run_id, FRONT, local)
        file = _artifact(client, run_id, FILE, local)
        rows = json.loads(front.read_text())["front"] if front else []
        points = load(file) if file else None
    if points is None:
        return {"front": rows, "digest": None, "registered_model": None, "promoted": []}
    name = model_name(points.identity)
    aliases = registry.aliases(name)
    promoted = [
        {
            "version": each.number,
            "uri": each.uri,
            "point": each.point,
            "aliases": sorted(a for a, number in aliases.items() if number == each.number),
        }
        for each in registry.versions(name)
        if each.run_id == run_id
    ]
    return {
        "front": rows, "digest": points.digest, "registered_model": name, "promoted": promoted,
    }  # fmt: skip


def _runs(client: Any, uri: str) -> list[Any]:
    """The runs of studies, the latest first; none where no study was ever made."""
    from mlflow.exceptions import MlflowException

    try:
        experiment = client.get_experiment_by_name(EXPERIMENT)
    except (MlflowException, OSError) as error:
        raise RegistryError(f"MLflow at {uri}: {error}") from error
    if experiment is None:
        return []
    # Trials have no version.
    return _search(client, uri, experiment.experiment_id, f"tags.`{_VERSION}` != ''")


def _search(client: Any, uri: str, experiment_id: str, which: str) -> list[Any]:
    """Runs of an experiment, the latest first."""
    from mlflow.exceptions import MlflowException

    found: list[Any] = []
    token: str | None = None
    try:
        while token is None or token:
            page = client.search_runs(
                [experiment_id],
                which,
                order_by=["attributes.start_time DESC"],
                max_results=1000,
                page_token=token,
            )
            found += page
            token = page.token or ""
    except (MlflowException, OSError) as error:
        raise RegistryError(f"MLflow at {uri}: {error}") from error
    return found


def _artifact(client: Any, run_id: str, name: str, folder: str) -> Path | None:
    """A file of a run, if it is there."""
    from mlflow.exceptions import MlflowException

    try:
        if name not in {each.path for each in client.list_artifacts(run_id)}:
            return None
        return Path(client.download_artifacts(run_id, name, folder))
    except (MlflowException, OSError) as error:
        raise RegistryError(f"run {run_id}: cannot read its {name}: {error}") from error
