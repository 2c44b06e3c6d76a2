"""Promotion and rollback from the dashboard: the registry and the server, one after the other.

As ``fathom promote`` does it: the server first, then the aliases, so that they never run ahead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from fathom.api.errors import ApiError
from fathom.api.points import PromoteRequest, asked_promotion, standing
from fathom.api.promotion import Takeover
from fathom.api.service import Service
from fathom.config import SCHEME


class Server(Protocol):
    """A server as ``/v1/operating_points`` shows it. All raise ``ApiError`` if it refuses."""

    async def standing(self) -> Mapping[str, Any]:
        """The answer of GET."""
        ...

    async def take(self, body: Mapping[str, Any]) -> None:
        """POST ``body``."""
        ...

    async def roll_back(self) -> None:
        """POST to ``/v1/operating_points/rollback``."""
        ...


class OwnServer:
    """The server that this process is part of."""

    def __init__(self, service: Service, takeover: Takeover) -> None:
        self._service = service
        self._takeover = takeover

    async def standing(self) -> Mapping[str, Any]:
        """See ``Server``."""
        return standing(self._service)

    async def take(self, body: Mapping[str, Any]) -> None:
        """See ``Server``."""
        await self._takeover.promote(asked_promotion(PromoteRequest.model_validate(body)))

    async def roll_back(self) -> None:
        """See ``Server``."""
        await self._takeover.rollback()


async def promote(server: Server, uri: str, run_id: str, point: str) -> None:
    """Have a server run at a point of a study, and move the registry's aliases.

    Args:
        uri: of the tracking server. run_id: of the study's run.

    Raises:
        ApiError, InvalidRequest, BackendUnavailable: if the server refuses; no alias has moved.
        ConfigError, RegistryError: from the study or the registry.
    """
    from fathom.tuning.registry import Registry, RegistryError
    from fathom.tuning.studies import find_study

    def register() -> tuple[Registry, Any, dict[str, Any]]:
        made = find_study(run_id, uri)
        points = made.points()
        if point not in points.points:
            raise ApiError(400, f"point must be one of {', '.join(points.points)}, got {point!r}.")
        registry = Registry(uri)
        version = registry.register(run_id, points, point, made.name)
        return registry, version, points.as_dict()

    registry, version, points = await asyncio.to_thread(register)
    await server.take({"points": points, "default": point, "source": version.uri})
    try:
        await asyncio.to_thread(registry.set_production, version)
    except RegistryError as error:
        raise RegistryError(
            f"the server runs at {point} now, but the registry's aliases could not be moved: "
            f"{error} Promote the point again."
        ) from error


async def roll_back(server: Server, uri: str) -> None:
    """Go back to what a server had before the last promotion; twice leads back.

    The registry follows where what is served is its version ``production``.

    Raises:
        ApiError, InvalidRequest, BackendUnavailable: if the server refuses; no alias has moved.
        RegistryError: from the registry.
    """
    from fathom.tuning.registry import PRODUCTION, Registry

    source = (await server.standing()).get("source") or ""
    await server.roll_back()
    if not source.startswith(SCHEME):
        return
    now = (await server.standing()).get("source") or ""

    def follow() -> None:
        registry = Registry(uri)
        version = registry.resolve(source)
        aliases = registry.aliases(version.name)
        # Somebody else may have promoted in the registry alone.
        if aliases.get(PRODUCTION) == version.number:
            before = registry.before(version.name)
            if (before.uri if before else "") == (now if now.startswith(SCHEME) else ""):
                registry.roll_back(version.name)

    await asyncio.to_thread(follow)
