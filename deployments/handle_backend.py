"""The API's backend over a Serve handle: what the ingress runs requests on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

from grpc.aio import AioRpcError
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.watch import ActorWatch, own_name
from fathom.api.backend import BackendUnavailable, ExitState, QueueFull, ReplicaReport
from fathom.api.resume import GIVE_UP_S, ReplicaLost, resuming
from fathom.types import InvalidRequest, Request, RequestOutput

Answer = TypeVar("Answer")

REPORT_TIMEOUT_S = 5.0
RETRY_AFTER_S = 2

# What a call raises when its replica dies (ActorDiedError, within 30 ms of a SIGKILL, before the
# first item and between items alike), is out of reach, or takes its node and the items on it along.
# A call that no replica has taken waits for one in Serve's router, and raises nothing. A call that
# was cancelled (TaskCancelledError) was cancelled by us: no loss.
LOSSES = (
    RayActorError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    NodeDiedError,
    ObjectLostError,
    WorkerCrashedError,
)


class HandleBackend:
    """Spreads requests over a deployment's replicas; see ``fathom.api.backend.Backend``.

    Args:
        limit: requests under way at once, waiting ones included; more are refused. Counted here
            and not by Serve: its ``broadcast`` waits for a free slot of each replica, so replicas
            that are full by Serve's count would fall silent in ``/metrics`` and ``/ready``.
        give_up_s: seconds after the loss of a replica in which no other goes on with a request.
        is_alive: see ``ActorWatch``.

    Attributes:
        on_resumption: called when a request has gone on at another replica.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        limit: int,
        give_up_s: float = GIVE_UP_S,
        is_alive: Callable[[str], bool] | None = None,
    ) -> None:
        self._handle = handle
        self._streaming: Any = handle.options(stream=True)
        self._limit = limit
        self._give_up_s = give_up_s
        self._name = own_name()
        self._replicas = ActorWatch(self._lose, is_alive=is_alive)
        self._streams: dict[str, Any] = {}
        self._lost: set[str] = set()
        self._live = 0
        self.on_resumption: Callable[[], None] = lambda: None

    async def generate(self, request: Request) -> AsyncGenerator[list[RequestOutput], None]:
        """See ``Backend.generate``. A request whose replica is lost goes on at another one.

        Serve's router avoids a replica that has just failed by itself.
        """
        if self._live >= self._limit:
            raise QueueFull(
                f"The server has {self._live} requests under way, its limit; try again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._live += 1
        try:
            news = resuming(
                request,
                self._attempt,
                give_up_s=self._give_up_s,
                on_resumption=lambda: self.on_resumption(),
            )
            async with aclosing(news) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._live -= 1

    async def _attempt(self, request: Request) -> AsyncGenerator[list[RequestOutput], None]:
        """Run a request at one replica.

        Raises:
            ReplicaLost: if the replica dies, cannot be reached, or has an engine that has stopped.
        """
        stream = None
        name = request.request_id
        ended = False
        try:
            with ExitStack() as watched:
                stream = self._streaming.generate.remote(request, caller=self._name)
                async for item in stream:
                    if isinstance(item, str):  # the replica's name, which comes first
                        self._streams[name] = stream
                        watched.enter_context(self._replicas.depending(item, name))
                        continue
                    if isinstance(item, InvalidRequest):
                        ended = True
                        raise item
                    yield item
            ended = True
        except LOSSES as error:
            # Also a replica that is only out of reach is told to stop, below.
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ReplicaLost(reason or type(error).__name__) from error
        except AioRpcError as error:  # over gRPC: a connection that broke, or was closed
            reason = f"{error.code().name.lower()}: {error.details()}"
            raise ReplicaLost(reason.partition("\n")[0].rstrip(".")) from error
        except TaskCancelledError as error:
            if name not in self._lost:
                raise
            raise ReplicaLost("Ray has given the replica up") from error
        except asyncio.CancelledError as error:
            here = asyncio.current_task()
            if here and here.cancelling():
                raise
            # Over gRPC a call that is cancelled here or there raises this, whoever asks for news.
            raise ReplicaLost("the call was cancelled") from error
        except RayTaskError as error:
            ended = True
            # Ray's wrapper would show the replica's traceback as the message.
            if isinstance(error.cause, BackendUnavailable):
                raise ReplicaLost(str(error.cause).rstrip(".")) from error.cause
            raise
        finally:
            self._streams.pop(name, None)
            self._lost.discard(name)
            # Serve cancels the calls of a request whose client went away, but not the ones of a
            # generator that is merely closed (an error elsewhere, a deadline).
            if stream is not None and not ended:
                stream.cancel()

    async def _lose(self, name: str) -> None:
        """End the stream of a request whose replica is dead, though its connection may be open."""
        stream = self._streams.get(name)
        if stream is not None:
            self._lost.add(name)
            stream.cancel()

    async def reports(self) -> Sequence[ReplicaReport]:
        """See ``Backend.reports``: asks every replica, and leaves out those that do not answer."""
        return await self._ask_all("report", ReplicaReport)

    async def exit_states(self) -> Sequence[ExitState]:
        """See ``Backend.exit_states``: asks every replica, as ``reports``."""
        return await self._ask_all("exit_state", ExitState)

    async def _ask_all(self, method: str, kind: type[Answer]) -> list[Answer]:
        try:
            answers = await self._handle.broadcast(method).results_async(
                timeout_s=REPORT_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayActorError, DeploymentUnavailableError):
            return []
        return [answer for answer in answers if isinstance(answer, kind)]
