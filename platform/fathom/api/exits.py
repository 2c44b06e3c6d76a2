"""``/v1/exits``: what exit policies have seen; ``/v1/operating_points``: what can be named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from fathom.api.backend import ExitState
from fathom.api.service import Service
from fathom.exits.cluster import merged
from fathom.tuning.operating_points import EFFORTS, OperatingPoints, compute_fields


def add_exit_routes(app: FastAPI, service: Service) -> None:
    """Add both routes; like every route under ``/v1`` they need a key where there are any."""

    @app.get("/v1/exits", response_model=None)
    async def exits() -> dict[str, Any]:
        """What the exit policies of every replica have seen, and all of them together."""
        return exits_body(await service.exit_states())

    @app.get("/v1/operating_points", response_model=None)
    async def operating_points() -> dict[str, Any]:
        """The points that ``compute.operating_point`` can name, with what was measured of them."""
        return points_body(service.points)


def exits_body(states: Sequence[ExitState]) -> dict[str, Any]:
    """The answer of ``/v1/exits``; see ``exits.cluster.merged``."""
    body = {
        "object": "exits",
        "replicas": [{"replica": each.replica, **each.state} for each in states],
        "merged": merged([each.state for each in states]),
    }
    found: dict[str, Any] = _finite(body)
    return found


def points_body(points: OperatingPoints | None) -> dict[str, Any]:
    """The answer of ``/v1/operating_points``: a list, empty without a file."""
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


def _finite(value: Any) -> Any:
    """A value with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
