"""Operating points that a running server has taken over, and how it is asked to."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fathom.api.compute import resolve_default
from fathom.tuning.operating_points import OperatingPoints, from_dict
from fathom.types import ComputePolicy, InvalidRequest


@dataclass(frozen=True, slots=True, eq=False)
class Promotion:
    """Points in the place of those that a server was started with.

    Attributes:
        points: their ``path`` says where they are from.
        default: the point of requests that name no compute; None leaves those as they were when the
            server was started.
        digest: ``points.digest``.
    """

    points: OperatingPoints
    default: str | None
    digest: str

    def default_compute(self, started: ComputePolicy) -> ComputePolicy:
        """The policy of requests that name none.

        Args:
            started: what they got when the server was started.

        Raises:
            ConfigError: for a point that is not there, or cannot be taken.
        """
        if self.default is not None:
            return resolve_default(ComputePolicy(operating_point=self.default), self.points)
        if started.operating_point and not self._has(started):
            # Its name would now be another point's, or nobody's.
            return dataclasses.replace(started, operating_point="")
        return started

    def _has(self, compute: ComputePolicy) -> bool:
        try:
            return self.points.resolve(compute.operating_point) == compute
        except InvalidRequest:
            return False

    def as_dict(self) -> dict[str, Any]:
        """Plain; see ``promotion_of``."""
        return {
            "points": self.points.as_dict(),
            "default": self.default,
            "source": self.points.path,
            "digest": self.digest,
        }


def promotion_of(body: Mapping[str, Any] | None) -> Promotion | None:
    """The inverse of ``Promotion.as_dict``.

    Raises:
        ConfigError: naming the first field at fault.
    """
    if body is None:
        return None
    points = from_dict(body["points"], body["source"])
    return Promotion(points, body["default"], body["digest"])


@dataclass(frozen=True, slots=True, eq=False)
class Promoted:
    """What has been promoted on a server: the ``user_config`` of its deployments.

    Attributes:
        current, previous: None for what the server was started with.
        since: when ``current`` came, in seconds since 1970; None if nothing was ever promoted.
        revision: another one after every change; empty if there was none.
    """

    current: Promotion | None = None
    previous: Promotion | None = None
    since: float | None = None
    revision: str = ""

    def promote(self, promotion: Promotion) -> Promoted:
        """With other points; itself if it has these."""
        own = self.current
        if own and (own.digest, own.default) == (promotion.digest, promotion.default):
            return self
        return self._changed(promotion)

    def rolled_back(self) -> Promoted:
        """With what was before the last change; twice leads back.

        Raises:
            InvalidRequest: if nothing was ever promoted.
        """
        if not self.revision:
            raise InvalidRequest(
                "nothing was promoted on this server since it was deployed, so there is nothing to "
                "roll back to: promote a point by `fathom promote`.",
                code="nothing_promoted",
            )
        return self._changed(self.previous)

    def _changed(self, current: Promotion | None) -> Promoted:
        return Promoted(current, self.current, time.time(), secrets.token_hex(8))

    def as_dict(self) -> dict[str, Any]:
        """Plain, as Serve takes it; see ``promoted_of``."""
        return {
            "current": self.current and self.current.as_dict(),
            "previous": self.previous and self.previous.as_dict(),
            "since": self.since,
            "revision": self.revision,
        }


def promoted_of(body: Mapping[str, Any]) -> Promoted:
    """The inverse of ``Promoted.as_dict``; an empty mapping is a server as it was started.

    Raises:
        ConfigError: naming the first field at fault.
    """
    return Promoted(
        promotion_of(body.get("current")),
        promotion_of(body.get("previous")),
        body.get("since"),
        body.get("revision", ""),
    )


class Takeover(Protocol):
    """Has a whole server take operating points over, all its processes, without a restart."""

    async def promote(self, promotion: Promotion) -> None:
        """Returns when all replicas and ingresses have the points; nothing changes if it raises.

        Raises:
            ApiError: if they are another model's, or not all have them in time.
            InvalidRequest: for a point that the engines cannot run.
            BackendUnavailable: if no engine is up.
        """
        ...

    async def rollback(self) -> None:
        """Go back to what was before the last promotion; see ``promote``.

        Raises:
            InvalidRequest: if nothing was ever promoted.
        """
        ...
