"""``/v1/operating_points``: what can be named, and which of it requests get that name nothing."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import Field

from fathom.api.promotion import Promotion, Takeover
from fathom.api.schemas import Model, Text
from fathom.api.service import Service
from fathom.settings import ConfigError
from fathom.tuning.operating_points import EFFORTS, OperatingPoints, compute_fields, from_dict
from fathom.types import InvalidRequest

_SENT = "the operating points sent"


class PromoteRequest(Model):
    """Body of ``POST /v1/operating_points``."""

    points: dict[str, Any] = Field(description="The content of a file of operating points.")
    default: Text | None = Field(
        None,
        description="The point of requests that name no compute; null leaves them what they got "
        "when the server was started.",
    )
    source: Text = Field("", description="Where the points are from, as `models:/NAME/VERSION`.")


def add_point_routes(app: FastAPI, service: Service, takeover: Takeover | None) -> None:
    """Add the routes; like every route under ``/v1`` they need a key where there are any.

    Args:
        takeover: how the server takes points over; without one it only says what it has.
    """

    @app.get("/v1/operating_points", response_model=None)
    async def operating_points() -> dict[str, Any]:
        """The points that ``compute.operating_point`` can name, with what was measured of them."""
        return standing(service)

    if takeover is None:
        return

    @app.post("/v1/operating_points", response_model=None)
    async def promote(body: PromoteRequest) -> dict[str, Any]:
        """Take points over. Answers when every process has them, with what GET then says.

        Requests under way end with what they began with.
        """
        await takeover.promote(asked_promotion(body))
        return standing(service)

    @app.post("/v1/operating_points/rollback", response_model=None)
    async def rollback() -> dict[str, Any]:
        """Go back to what was before the last promotion; twice leads back."""
        await takeover.rollback()
        return standing(service)


def asked_promotion(body: PromoteRequest) -> Promotion:
    """What is asked for.

    Raises:
        InvalidRequest: for points that cannot be used.
    """
    try:
        points = from_dict(body.points, body.source or _SENT)
    except ConfigError as error:
        raise InvalidRequest(str(error), param="points") from error
    if body.default is not None and body.default not in points.points:
        raise InvalidRequest(
            f"default must be one of {', '.join(points.points)}, got {body.default!r}.",
            param="default",
        )
    return Promotion(points, body.default, points.digest)


def standing(service: Service) -> dict[str, Any]:
    """The answer of ``/v1/operating_points``.

    ``points_body`` and: ``default``, the point of requests that name no compute, null if what they
    get is no point; ``since``, when that was promoted, in seconds since 1970, null if nothing was
    since the server was deployed; ``source``, where the points are from; ``digest``, of their
    content; ``can_roll_back``.
    """
    promoted = service.promoted
    points = service.points
    return {
        **points_body(points),
        "default": service.default_compute.operating_point or None,
        "since": promoted.since,
        "source": points.path if points else None,
        "digest": service.points_digest,
        "can_roll_back": bool(promoted.revision),
    }


def points_body(points: OperatingPoints | None) -> dict[str, Any]:
    """Points as a list of OpenAI's kind, empty if there are none."""
    if points is None:
        return {"object": "list", "data": []}
    efforts = {name: effort for effort, name in EFFORTS.items()}
    data = []
    for name, point in points.points.items():
        entry = {
            "id": name,
            "object": "operating_point",
            "compute": compute_fields(point.compute),
            "measured": dict(point.measured),
        }
        if name in efforts:
            entry["reasoning_effort"] = efforts[name]
        if point.note:
            entry["note"] = point.note
        data.append(entry)
    own, table = points.identity, points.calibration
    return {
        "object": "list",
        "data": data,
        "measured_on": {
            "model": own.model,
            "adapter": own.adapter,
            "exit_layer": own.exit_layer,
            "exit_cost": own.exit_cost,
            "trace": own.trace,
            "trace_sha256": own.trace_sha256,
        },
        "calibration": {
            "confidence": table.confidence.value,
            "exit_temperature": table.exit_temperature,
            "requests": len(table.losses.rows),
            "rows": int(table.losses.rows.sum()),
        },
    }
