"""``/v1/exits``: what exit policies have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI

from fathom.api.backend import ExitState
from fathom.api.service import Service
from fathom.exits.cluster import merged


def add_exit_route(app: FastAPI, service: Service) -> None:
    """Add the route; like every route under ``/v1`` it needs a key where there are any."""

    @app.get("/v1/exits", response_model=None)
    async def exits() -> dict[str, Any]:
        """What the exit policies of every replica have seen, and all of them together."""
        return exits_body(await service.exit_states(), await service.shadow_state())


def exits_body(
    states: Sequence[ExitState], shadow: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The answer of ``/v1/exits``; see ``exits.cluster.merged``, and ``Service.shadow``."""
    body = {
        "object": "exits",
        "replicas": [{"replica": each.replica, **each.state} for each in states],
        "merged": merged([each.state for each in states]),
        "shadow": shadow,
    }
    found: dict[str, Any] = _finite(body)
    return found


def _finite(value: Any) -> Any:
    """A value with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
