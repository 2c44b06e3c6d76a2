"""Operating points: named, measured settings, in one file with what they were measured on.

The file holds points (``exact``, ``balanced``, ``fast`` and a user's own), each a compute policy in
its fields with figures from held-out requests, and a calibration table, from which a threshold for
any risk or budget follows when a request asks for it. A threshold means nothing on another model
or with another adapter, so the file names both by their digests, and ``check`` refuses others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fathom.checks import InvalidRequest
from fathom.compute import AcceptMode, ComputePolicy, Confidence, PolicyName
from fathom.engine.info import EngineInfo
from fathom.exits.budget import exit_share
from fathom.exits.p_values import Bound
from fathom.exits.risk import Certificate, Losses, certify_losses
from fathom.settings import ConfigError, from_mapping, read_yaml
from fathom.tuning.loss_table import decode_losses, encode_losses

VERSION = 1

EFFORTS = {"low": "fast", "medium": "balanced", "high": "exact"}
"""``reasoning_effort`` to the point that it stands for."""

EFFORT_MODES = {"low": AcceptMode.FREE, "medium": AcceptMode.ROLLBACK, "high": AcceptMode.EXACT}
"""``reasoning_effort`` to a mode, where no file has such a point."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What points were measured on; fields as of ``EngineInfo``, and the trace.

    Attributes:
        exit_cost: of a token decided at the exit, as a share of a full one's.
        trace: name of the file; trace_sha256: of its content.
    """

    model: str
    weights_digest: str
    adapter: str
    adapter_digest: str
    exit_layer: int
    exit_vocab: int
    dtype: str
    exit_cost: float
    trace: str
    trace_sha256: str


@dataclass(frozen=True, slots=True)
class Point:
    """A named setting.

    Attributes:
        compute: with the point's name in ``operating_point``.
        measured: figures of held-out requests; empty for a point that nobody has measured.
        note: what a reader should know of it.
    """

    compute: ComputePolicy
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Enough of a trace to certify any risk and to guess a threshold for any budget.

    Attributes:
        losses: of held-out requests, which chose neither measure nor temperature.
        bound: that certificates are computed by; chosen before looking at what either gives.
    """

    confidence: Confidence
    exit_temperature: float
    losses: Losses
    bound: Bound = Bound.HOEFFDING_BENTKUS


@dataclass(frozen=True, slots=True, eq=False)
class OperatingPoints:
    """The content of a file of operating points."""

    path: str
    identity: Identity
    points: Mapping[str, Point]
    calibration: Calibration

    def check(self, info: EngineInfo) -> None:
        """Check that the points belong to what an engine runs.

        Raises:
            ConfigError: naming what differs, with both values, and the remedy.
        """
        own = self.identity
        for name, what in (
            ("weights_digest", "model"),
            ("adapter_digest", "adapter"),
            ("exit_layer", "exit layer"),
            ("exit_vocab", "exit vocabulary"),
            ("dtype", "dtype"),
        ):
            theirs, ours = getattr(info, name), getattr(own, name)
            if theirs == ours:
                continue
            label = getattr(own, what, ""), getattr(info, what, "")
            measured, served = (
                f"{value or 'none'} ({known})" if known and known != value else f"{value or 'none'}"
                for value, known in zip((ours, theirs), label, strict=True)
            )
            raise ConfigError(
                f"{self.path}: these operating points were measured on another {what}: {name} "
                f"{measured}, this engine has {served}. Serve what they were measured on, or trace "
                "this engine and run `fathom calibrate fit` on the trace."
            )

    def resolve(self, name: str) -> ComputePolicy:
        """The compute policy of a point.

        Raises:
            InvalidRequest: if there is no such point.
        """
        point = self.points.get(name)
        if point is None:
            known = ", ".join(self.points)
            raise InvalidRequest(
                f"operating_point must be one of {known}, got {name!r}.", param="operating_point"
            )
        compute = point.compute
        if compute.policy is PolicyName.RISK and compute.exit_threshold is None:
            return self.with_risk(compute)
        if compute.policy is PolicyName.BUDGET and compute.exit_threshold is None:
            return self.with_budget(compute)
        return compute

    def for_effort(self, effort: str) -> ComputePolicy | None:
        """The point that a ``reasoning_effort`` of low, medium or high stands for, if it is here.

        Raises:
            InvalidRequest: for another effort.
        """
        if effort not in EFFORTS:
            raise InvalidRequest(
                f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort!r}.",
                param="reasoning_effort",
            )
        name = EFFORTS[effort]
        return self.resolve(name) if name in self.points else None

    def ladder(self) -> list[tuple[ComputePolicy, float]]:
        """Points that were measured, with the share of full compute that each spends."""
        return [
            (self.resolve(name), point.measured["budget"])
            for name, point in self.points.items()
            if "budget" in point.measured and point.compute.policy is not PolicyName.RISK
        ]

    def certify(self, delta: float, epsilon: float) -> Certificate:
        """The lowest threshold that the calibration table certifies.

        Raises:
            TooLittleData: where it is too small for the promise.
        """
        own = self.calibration
        return certify_losses(own.losses, delta, epsilon, own.bound)

    def with_risk(self, compute: ComputePolicy) -> ComputePolicy:
        """A policy ``risk`` with its certified λ, by the measure that the table is of.

        Raises:
            TooLittleData: where the table is too small for the promise.
        """
        assert compute.risk is not None
        found = self.certify(compute.risk, 1 - compute.risk_confidence)
        return self._measured(compute, found.threshold)

    def with_budget(self, compute: ComputePolicy) -> ComputePolicy:
        """A policy ``budget`` with a first λ, by the measure that the table is of.

        Raises:
            InvalidRequest: for a budget below what the exit costs.
        """
        assert compute.budget is not None
        share = exit_share(compute.budget, self.identity.exit_cost)
        return self._measured(compute, self.threshold_at(share))

    def threshold_at(self, share: float) -> float:
        """λ above which this share of the table's rows lies, interpolated between its grid."""
        table = self.calibration.losses
        shares = np.concatenate([[0.0], table.exits.sum(axis=0) / table.rows.sum(), [1.0]])
        grid = np.concatenate([[1.0], table.grid, [0.0]])
        return float(np.interp(share, shares, grid))

    def _measured(self, compute: ComputePolicy, threshold: float) -> ComputePolicy:
        own = self.calibration
        return dataclasses.replace(
            compute,
            confidence=own.confidence,
            exit_temperature=own.exit_temperature,
            exit_threshold=threshold,
        )

    @property
    def digest(self) -> str:
        """Sha256 of the content, in hexadecimal: equal for equal files, whatever their form."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The file's content, plain: what ``from_dict`` reads."""
        own = self.calibration
        return {
            "version": VERSION,
            "measured_on": dataclasses.asdict(self.identity),
            "points": {
                name: {
                    "compute": compute_fields(point.compute),
                    **({"measured": dict(point.measured)} if point.measured else {}),
                    **({"note": point.note} if point.note else {}),
                }
                for name, point in self.points.items()
            },
            "calibration": {
                "confidence": own.confidence.value,
                "exit_temperature": own.exit_temperature,
                "bound": own.bound.value,
                **encode_losses(own.losses),
            },
        }

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, width=100))
        partial.replace(path)


def compute_fields(compute: ComputePolicy) -> dict[str, Any]:
    """The fields of a policy that differ from the defaults, mode and policy always, plain."""
    default = ComputePolicy()
    values = {
        name: getattr(compute, name)
        for name in ComputePolicy.__dataclass_fields__
        if name != "operating_point"
        and (name in ("mode", "policy") or getattr(compute, name) != getattr(default, name))
    }
    return {name: v.value if isinstance(v, StrEnum) else v for name, v in values.items()}


def load(path: Path) -> OperatingPoints:
    """Read a file of operating points.

    Raises:
        ConfigError: for a file that cannot be read, or naming the first field at fault.
    """
    return from_dict(read_yaml(path), str(path))


def from_dict(body: Mapping[str, Any], path: str) -> OperatingPoints:
    """Operating points from a file's content.

    Args:
        path: where the content is from, for errors.

    Raises:
        ConfigError: naming the first field at fault.
    """
    if body.get("version") != VERSION:
        raise ConfigError(
            f"{path}: operating points of version {body.get('version')!r}, this version of Fathom "
            f"reads {VERSION}: make them again by `fathom calibrate fit`."
        )
    try:
        table = body["calibration"]
        return OperatingPoints(
            path=path,
            identity=Identity(**body["measured_on"]),
            points={str(name): _point(path, str(name), v) for name, v in body["points"].items()},
            calibration=Calibration(
                Confidence(table["confidence"]),
                float(table["exit_temperature"]),
                decode_losses(table),
                Bound(table["bound"]),
            ),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path}: cannot use the operating points: {what}. Make them again by `fathom "
            "calibrate fit`, and add your own under points: NAME: {compute: {...}}."
        ) from error


def _point(path: str, name: str, body: Any) -> Point:
    where = f"{path}: points.{name}"
    if not isinstance(body, dict) or not isinstance(body.get("compute"), dict):
        raise ConfigError(f"{where}: needs compute: a map of fields of the compute policy.")
    fields = from_mapping(ComputePolicy, body["compute"], f"{where}.compute.")
    compute = dataclasses.replace(fields, operating_point=name)
    try:
        compute.validate()
    except InvalidRequest as error:
        raise ConfigError(f"{where}.compute: {error}") from error
    return Point(compute, body.get("measured", {}), str(body.get("note", "")))
