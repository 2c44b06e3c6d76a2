"""The replicas behind the ingress: one engine each, behind a Serve handle.

``FusedReplica`` has both stages in its process; ``deployments.shallow`` has the one whose deep
stage is elsewhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray import serve

from deployments.autoscaling import REQUESTS
from deployments.policies import PolicyExchange
from deployments.shadow import ShadowReporter
from deployments.shared import end_if_deleted, open_store
from deployments.watch import ActorWatch, own_name
from fathom.api.backend import ExitState, ReplicaReport
from fathom.api.local import LocalBackend
from fathom.api.promotion import promoted_of
from fathom.config import ConfigError, EngineConfig, PoolConfig, ServeConfig
from fathom.exits.shadow import ShadowLog
from fathom.tuning.operating_points import OperatingPoints
from fathom.types import ComputePolicy, InvalidRequest, Request, RequestOutput

if TYPE_CHECKING:  # who builds the application needs no torch
    from fathom.engine.engine import Engine


def engine_config(config: ServeConfig, pool: PoolConfig) -> EngineConfig:
    """A replica's engine settings, and torch's threads set to them.

    Two busy processes with more threads than cores between them slow each other down by an order
    of magnitude, so the threads follow from what Ray reserved. Call this first of all: the engine
    measures its stages while it is built.
    """
    import torch

    threads = config.engine.threads or max(1, int(pool.cpus))
    torch.set_num_threads(threads)
    return dataclasses.replace(config.engine, threads=threads)


class Replica:
    """Serves one engine. What kind of engine is for subclasses to say.

    Args:
        points: the operating points of the server, if it has any.

    Raises:
        ConfigError: for points that were measured on something else than the engine runs.
    """

    _shadow: ShadowReporter | None = None
    _exchange: PolicyExchange | None = None

    def __init__(
        self, config: ServeConfig, engine: Engine, points: OperatingPoints | None = None
    ) -> None:
        from fathom.engine.async_engine import AsyncEngine

        if points is not None:
            points.check(engine.info)
        self._started = points
        self._revision = ""
        engine.shift_under_load(config.load_aware, points.ladder() if points else ())
        if config.shadow.rate:
            engine.shadow = ShadowLog(config.shadow.rate)
        self._serve(config, AsyncEngine(engine))
        if engine.shadow is not None:
            self._shadow = ShadowReporter(self._application, config, engine.shadow, self._engine)
        if config.serving.most > 1:
            self._exchange = PolicyExchange(
                self._application, self._name, engine.info.exit_identity, self._engine
            )

    def _serve(self, config: ServeConfig, engine: Any) -> None:
        """Serve requests by an engine.

        Args:
            engine: an ``AsyncEngine``, or what has its interface.
        """
        context = serve.get_replica_context()
        self._application: str = context.app_name
        self._name: str = context.replica_id.unique_id
        self._engine = engine
        self._callers = ActorWatch(engine.cancel)
        self._backend = LocalBackend(engine, name=self._name, interval_s=config.stream_interval_s)

    async def generate(
        self, request: Request, caller: str = ""
    ) -> AsyncGenerator[str | list[RequestOutput] | InvalidRequest, None]:
        """Run a request; see ``Backend.generate``. It ends when ``caller`` dies (``watch``).

        A caller that gave its name gets this replica's as the first item, to watch it in turn.
        An invalid request is an item, not an exception: Serve logs exceptions with their
        traceback as a replica's failure, and this one is the caller's.
        """
        if caller:
            yield own_name()
        try:
            with self._callers.depending(caller, request.request_id):
                async with aclosing(self._backend.generate(request)) as batches:
                    async for batch in batches:
                        yield batch
        except InvalidRequest as error:
            yield error

    def report(self) -> ReplicaReport:
        """This replica's figures.

        Raises:
            BackendUnavailable: if its engine has died.
        """
        return self._backend.report()

    async def exit_state(self) -> ExitState:
        """What the exit policies here have seen; see ``Backend.exit_states``."""
        return await self._backend.exit_state()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Called by Serve, at the start and after each promotion; see ``deployments.takeover``.

        Raises:
            ConfigError: for points of another engine's; a replica that starts with such does not.
        """
        promoted = promoted_of(user_config)
        points = promoted.current.points if promoted.current else self._started
        if points is not None:
            points.check(self._engine.info)
        if promoted.revision != self._revision:
            await self._engine.take_points(points.ladder() if points else ())
            self._revision = promoted.revision

    def points_revision(self) -> str:
        """``Promoted.revision`` of the points that are at hand here."""
        return self._revision

    async def check_points(
        self, points: OperatingPoints, compute: ComputePolicy
    ) -> ConfigError | InvalidRequest | None:
        """What would keep this engine from points and a default policy, if anything does.

        Given, not raised: Serve logs what a call raises as a replica's failure.
        """
        try:
            points.check(self._engine.info)
            points.ladder()
            await self._engine.check_compute(compute)
        except (ConfigError, InvalidRequest) as error:
            return error
        return None

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the requests here, running and waiting."""
        stats = self._engine.stats()
        return {REQUESTS: stats["num_requests_running"] + stats["num_requests_waiting"]}

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here.

        Raises:
            EngineDead: if the engine has died.
        """
        self._engine.check_health()

    async def __del__(self) -> None:
        # Serve calls this after it has let the requests under way finish.
        for name in ("_exchange", "_shadow"):
            thread = getattr(self, name, None)
            if thread is not None:
                thread.close()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.shutdown(0)
            await asyncio.to_thread(end_if_deleted, self._application)


class FusedReplica(Replica):
    """Shallow and deep stage in one process. Undecorated: ``app.build`` makes it a deployment.

    Raises:
        ConfigError, ModelError: if the engine cannot be built, or the operating points are another
            one's.
    """

    def __init__(self, config: ServeConfig, points: OperatingPoints | None = None) -> None:
        settings = engine_config(config, config.serving)

        from fathom.engine.build import build_engine

        store = open_store(config, serve.get_replica_context().app_name)
        super().__init__(config, build_engine(settings, store=store, encodes=False), points)
