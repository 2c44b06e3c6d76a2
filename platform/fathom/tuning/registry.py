"""Operating points in the MLflow Model Registry: what was promoted, what serves, what was before.

A registered model is one model with one adapter. A version of it is a file of operating points with
the point of it that was promoted; the file lies in the study's run, under its content's digest, so
that a study that goes on never changes a version. Alias ``production`` is the version that serves,
``previous`` the one that a rollback returns to.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.config import SCHEME
from fathom.tuning.operating_points import Identity, OperatingPoints, load

PRODUCTION, PREVIOUS = "production", "previous"
FILE = "points.yaml"
_STUDY, _POINT, _DIGEST = "fathom.study", "fathom.point", "fathom.points_digest"


class RegistryError(RuntimeError):
    """The registry does not answer, or has not what was asked for; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a registered model.

    Attributes:
        name: of the registered model. number: of the version, from 1.
        point: the one that was promoted. study: that the points are from. digest: of the points.
        run_id: of the study's run, which has the file.
    """

    name: str
    number: int
    point: str
    study: str
    digest: str
    run_id: str

    @property
    def uri(self) -> str:
        """As ``fathom serve --operating-points`` takes it."""
        return f"{SCHEME}{self.name}/{self.number}"


def model_name(identity: Identity) -> str:
    """The registered model of a model with an adapter."""
    parts = ["fathom", identity.model.rstrip("/").rpartition("/")[2]]
    if identity.adapter:
        parts.append(identity.adapter.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.-]", "-", "-".join(parts))


def connect(uri: str) -> Any:
    """An ``MlflowClient``.

    Args:
        uri: of the tracking server, which has the registry too; or ``sqlite:///FILE``.

    Raises:
        RegistryError: for an SQLite file that does not exist.
    """
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).exists():
        raise RegistryError(f"there is no MLflow store at {file}.")
    # A server that is away should be told of within seconds, not after MLflow's minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils"):  # what it does to its own tables
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow  # takes seconds

    return mlflow.MlflowClient(uri, registry_uri=uri)


class Registry:
    """The registry behind a tracking URI.

    Every method raises ``RegistryError`` where MLflow does not answer.

    Args:
        uri: see ``connect``.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client = connect(uri)

    def versions(self, name: str) -> list[Version]:
        """All versions that this library has made of a model, the latest first."""
        found = []
        token: str | None = None
        while token is None or token:
            page = self._call("search_model_versions", f"name = '{name}'", page_token=token)
            found += [_version(each) for each in page if _DIGEST in each.tags]
            token = page.token or ""
        return sorted(found, key=lambda version: -version.number)

    def aliases(self, name: str) -> dict[str, int]:
        """Version numbers by alias; empty for a model that is not there."""
        model = self._call("get_registered_model", name, missing=None)
        return {} if model is None else {a: int(n) for a, n in model.aliases.items()}

    def version(self, name: str, number: int) -> Version:
        """A version by its number.

        Raises:
            RegistryError: if there is none, or this library has not made it.
        """
        found = self._call("get_model_version", name, str(number), missing=None)
        return self._ours(found, f"{SCHEME}{name}/{number}")

    def register(self, run_id: str, points: OperatingPoints, point: str, study: str) -> Version:
        """The version of these points with this one promoted; made if there is none.

        Args:
            run_id: of the study's run, which gets the file. study: its name.
        """
        if self._call("get_run", run_id, missing=None) is None:
            raise RegistryError(
                f"run {run_id} of study {study} is not at {self.uri}: name the tracking server "
                "that `fathom tune` wrote to."
            )
        name, digest = model_name(points.identity), points.digest
        for found in self.versions(name):
            if (found.digest, found.point) == (digest, point):
                return found
        folder = f"operating_points/{digest[:16]}"
        self._keep(run_id, points, folder)
        if self._call("get_registered_model", name, missing=None) is None:
            about = f"Operating points of {points.identity.model} for `fathom serve`."
            self._call("create_registered_model", name, description=about, there=None)
        own = points.identity
        tags = {
            _STUDY: study,
            _POINT: point,
            _DIGEST: digest,
            "fathom.model": own.model,
            "fathom.weights_digest": own.weights_digest,
            "fathom.adapter": own.adapter,
            "fathom.adapter_digest": own.adapter_digest,
            "fathom.trace_sha256": own.trace_sha256,
            **{f"fathom.{k}": str(v) for k, v in points.points[point].measured.items()},
        }
        source = f"runs:/{run_id}/{folder}"
        return _version(
            self._call("create_model_version", name, source=source, run_id=run_id, tags=tags)
        )

    def set_production(self, version: Version) -> bool:
        """Give a version the alias ``production``; what had it is ``previous`` then.

        Returns:
            False if it had it already; nothing changes then.
        """
        aliases = self.aliases(version.name)
        last = aliases.get(PRODUCTION)
        if last == version.number:
            return False
        # In this order: cut off between the two, it can be done again.
        self._set(version.name, aliases, PREVIOUS, last)
        self._set(version.name, aliases, PRODUCTION, version.number)
        return True

    def before(self, name: str) -> Version | None:
        """What a rollback returns to; None for what servers were started with.

        Raises:
            RegistryError: if nothing was ever promoted.
        """
        aliases = self.aliases(name)
        if not {PRODUCTION, PREVIOUS} & set(aliases):
            raise RegistryError(
                f"no version of {name} was promoted at {self.uri}, so there is nothing to roll "
                "back to: promote a point by `fathom promote`."
            )
        number = aliases.get(PREVIOUS)
        return None if number is None else self.version(name, number)

    def roll_back(self, name: str) -> None:
        """Swap ``production`` and ``previous``, of which one may be missing; twice leads back."""
        aliases = self.aliases(name)
        self._set(name, aliases, PRODUCTION, aliases.get(PREVIOUS))
        self._set(name, aliases, PREVIOUS, aliases.get(PRODUCTION))

    def load(self, uri: str) -> tuple[OperatingPoints, Version]:
        """The points of a version.

        Args:
            uri: ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER``.

        Raises:
            RegistryError: for another form, or what is not there.
            ConfigError: for a file that cannot be used.
        """
        version = self.resolve(uri)
        with tempfile.TemporaryDirectory(prefix="fathom-points-") as folder:
            file = self._call(
                "download_artifacts",
                version.run_id,
                f"operating_points/{version.digest[:16]}/{FILE}",
                folder,
            )
            points = load(Path(file))
        if points.digest != version.digest:
            raise RegistryError(
                f"{version.uri}: its file is not the one that was registered (digest "
                f"{points.digest}, not {version.digest}): promote the study again."
            )
        return dataclasses.replace(points, path=version.uri), version

    def resolve(self, uri: str) -> Version:
        """The version that a URI names; see ``load``."""
        found = re.fullmatch(r"models:/([\w.-]+)(?:@([\w.-]+)|/([0-9]+))", uri)
        if found is None:
            raise RegistryError(f"{uri}: must be models:/NAME@ALIAS or models:/NAME/VERSION.")
        name, alias, number = found.groups()
        if number is not None:
            return self.version(name, int(number))
        aliases = self.aliases(name)
        if alias not in aliases:
            known = ", ".join(sorted(aliases)) or "none"
            raise RegistryError(
                f"{uri}: there is no such alias at {self.uri} (of {name}: {known}); `fathom "
                "promote` sets `production`."
            )
        return self.version(name, aliases[alias])

    def _keep(self, run_id: str, points: OperatingPoints, folder: str) -> None:
        """Keep the file in the run, if it is not there."""
        there = self._call("list_artifacts", run_id, folder)
        if f"{folder}/{FILE}" in {each.path for each in there}:
            return
        with tempfile.TemporaryDirectory(prefix="fathom-points-") as local:
            points.save(Path(local, FILE))
            self._call("log_artifact", run_id, str(Path(local, FILE)), folder)

    def _set(self, name: str, there: Mapping[str, int], alias: str, number: int | None) -> None:
        """Give a version an alias; without a version, take the alias away."""
        if number is not None:
            self._call("set_registered_model_alias", name, alias, str(number))
        elif alias in there:
            self._call("delete_registered_model_alias", name, alias)

    def _ours(self, found: Any, uri: str) -> Version:
        if found is None:
            raise RegistryError(f"{uri}: there is no such version at {self.uri}.")
        if _DIGEST not in found.tags:
            raise RegistryError(f"{uri}: no operating points of `fathom promote`.")
        return _version(found)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call MLflow.

        Args:
            options: of the method; ``missing`` and ``there`` are given back instead of errors that
                say that something is not there, or is already.
        """
        given = {
            "RESOURCE_DOES_NOT_EXIST": [options.pop(n) for n in ("missing",) if n in options],
            "RESOURCE_ALREADY_EXISTS": [options.pop(n) for n in ("there",) if n in options],
        }
        from mlflow.exceptions import MlflowException

        try:
            return getattr(self._client, method)(*args, **options)
        except MlflowException as error:
            if instead := given.get(error.error_code):
                return instead[0]
            raise RegistryError(f"MLflow at {self.uri}: {error}") from error
        except OSError as error:
            raise RegistryError(f"MLflow at {self.uri}: {error}") from error


def _version(found: Any) -> Version:
    tags: Mapping[str, str] = found.tags
    return Version(
        name=found.name,
        number=int(found.version),
        point=tags[_POINT],
        study=tags[_STUDY],
        digest=tags[_DIGEST],
        run_id=found.run_id,
    )
