"""Ending the requests of callers that have died.

Ray tells a replica nothing when the process that called it is killed: its generator runs on to the
end, as if somebody were reading (seen with Ray 2.60: of 400 items, one every 20 ms, the replica
made all 400 after its caller got SIGKILL at the 100th). The request would hold its place and its KV
blocks. So every call names its caller, and a replica asks Ray once a second whether the callers
that it works for are alive. Ray forgets a named actor within milliseconds of its process's end, and
of its node's as soon as the health check (``RAY_health_check_*``) has given the node up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import ray

logger = logging.getLogger("ray.serve")

NAMESPACE = "serve"
"""That of the actors of Serve's replicas."""

PERIOD_S = 1.0
_SURE_AFTER = 2
"""Times in a row that a caller must be missing: one answer may come from a cluster in trouble."""


def caller_name() -> str:
    """The name by which replicas know this process; empty outside of a Serve replica."""
    name: str | None = ray.get_runtime_context().get_actor_name()
    return name or ""


class CallerWatch:
    """Watches the callers of the requests under way. Belongs to one event loop.

    Args:
        cancel: ends a request by its id.
        is_alive: whether a caller is, by its name; blocks, and raises if that cannot be told.
    """

    def __init__(
        self,
        cancel: Callable[[str], Awaitable[object]],
        *,
        is_alive: Callable[[str], bool] | None = None,
        period_s: float = PERIOD_S,
    ) -> None:
        self._cancel = cancel
        self._is_alive = is_alive or _is_alive
        self._period_s = period_s
        self._requests: dict[str, set[str]] = {}
        self._missing: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def serving(self, caller: str, request_id: str) -> Iterator[None]:
        """A request is under way for a caller; one without a name is not watched."""
        if not caller:
            yield
            return
        self._requests.setdefault(caller, set()).add(request_id)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            own = self._requests.get(caller, set())
            own.discard(request_id)
            if not own:
                self._requests.pop(caller, None)
                self._missing.pop(caller, None)

    async def _watch(self) -> None:
        """Look after the callers as long as there are any."""
        while self._requests:
            await asyncio.sleep(self._period_s)
            for caller in list(self._requests):
                try:
                    alive = await asyncio.to_thread(self._is_alive, caller)
                except Exception:  # the cluster's head does not answer, which says nothing of it
                    continue
                if alive:
                    self._missing.pop(caller, None)
                    continue
                self._missing[caller] = self._missing.get(caller, 0) + 1
                if self._missing[caller] >= _SURE_AFTER:
                    await self._end(caller)

    async def _end(self, caller: str) -> None:
        self._missing.pop(caller, None)
        orphans = list(self._requests.pop(caller, ()))
        logger.warning("Caller %s has died; its %d requests end.", caller, len(orphans))
        for request_id in orphans:
            try:
                await self._cancel(request_id)
            except Exception as error:  # an engine that has died runs nothing
                logger.warning("Request %s could not be ended: %s", request_id, error)


def _is_alive(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True
