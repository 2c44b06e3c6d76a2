"""The API's backend over a Serve handle: what the ingress runs requests on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from fathom.api.backend import BackendUnavailable, QueueFull, ReplicaReport
from fathom.types import InvalidRequest, Request, RequestOutput

REPORT_TIMEOUT_S = 5.0
RETRY_AFTER_S = 2


class HandleBackend:
    """Spreads requests over a deployment's replicas; see ``fathom.api.backend.Backend``.

    Args:
        limit: requests under way at once, waiting ones included; more are refused. Counted here
            and not by Serve: its ``broadcast`` waits for a free slot of each replica, so replicas
            that are full by Serve's count would fall silent in ``/metrics`` and ``/ready``.
    """

    def __init__(self, handle: DeploymentHandle, *, limit: int) -> None:
        self._handle = handle
        self._streaming: Any = handle.options(stream=True)
        self._limit = limit
        self._live = 0

    async def generate(self, request: Request) -> AsyncGenerator[list[RequestOutput], None]:
        """See ``Backend.generate``."""
        if self._live >= self._limit:
            raise QueueFull(
                f"The server has {self._live} requests under way, its limit; try again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._live += 1
        stream = self._streaming.generate.remote(request)
        ended = False
        try:
            async for item in stream:
                if isinstance(item, InvalidRequest):
                    ended = True
                    raise item
                yield item
            ended = True
        except (RayActorError, DeploymentUnavailableError) as error:
            ended = True
            raise BackendUnavailable("The engine's replica has stopped; try again.") from error
        except RayTaskError as error:
            ended = True
            # Ray's wrapper would show the replica's traceback as the message.
            if isinstance(error.cause, BackendUnavailable):
                raise error.cause from None
            raise
        finally:
            self._live -= 1
            # Serve cancels the calls of a request whose client went away, but not the ones of a
            # generator that is merely closed (an error elsewhere, a deadline).
            if not ended:
                stream.cancel()

    async def reports(self) -> Sequence[ReplicaReport]:
        """See ``Backend.reports``: asks every replica, and leaves out those that do not answer."""
        try:
            answers = await self._handle.broadcast("report").results_async(
                timeout_s=REPORT_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayActorError, DeploymentUnavailableError):
            return []
        return [answer for answer in answers if isinstance(answer, ReplicaReport)]
