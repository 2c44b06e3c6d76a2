"""Ending the requests that hang on a process that has died.

Ray tells a replica nothing when the process that called it is killed: its generator runs on to the
end, as if somebody were reading (seen with Ray 2.60: of 400 items, one every 20 ms, the replica
made all 400 after its caller got SIGKILL at the 100th). The request would hold its place and its KV
blocks. And where calls go over gRPC, a caller learns nothing of a machine that is gone without a
word: its connection stays open. So a call names its caller, the answer names its replica, and each
side asks Ray once a second whether those that it works with are alive. Ray forgets a named actor
within milliseconds of its process's end, and of its node's as soon as the health check
(``RAY_health_check_*``) has given the node up.
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


def own_name() -> str:
    """The name by which others know this process; empty outside of a Serve replica."""
    name: str | None = ray.get_runtime_context().get_actor_name()
    return name or ""


class ActorWatch:
    """Watches the actors that the requests under way hang on. Belongs to one event loop.

    Args:
        cancel: ends a request by its id.
        is_alive: whether an actor is, by its name; blocks, and raises if that cannot be told.
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
    def depending(self, actor: str, request_id: str) -> Iterator[None]:
        """A request hangs on an actor; one without a name is not watched."""
        if not actor:
            yield
            return
        self._requests.setdefault(actor, set()).add(request_id)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            own = self._requests.get(actor, set())
            own.discard(request_id)
            if not own:
                self._requests.pop(actor, None)
                self._missing.pop(actor, None)

    async def _watch(self) -> None:
        """Look after the actors as long as there are any."""
        while self._requests:
            await asyncio.sleep(self._period_s)
            for actor in list(self._requests):
                try:
                    alive = await asyncio.to_thread(self._is_alive, actor)
                except Exception:  # the cluster's head does not answer, which says nothing of it
                    continue
                if alive:
                    self._missing.pop(actor, None)
                    continue
                self._missing[actor] = self._missing.get(actor, 0) + 1
                if self._missing[actor] >= _SURE_AFTER:
                    await self._end(actor)

    async def _end(self, actor: str) -> None:
        self._missing.pop(actor, None)
        orphans = list(self._requests.pop(actor, ()))
        logger.warning("%s has died; its %d requests here end.", actor, len(orphans))
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
