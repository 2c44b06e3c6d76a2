"""The fused replica: shallow and deep stage in one process, behind a Serve handle."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve

from fathom.api.backend import ReplicaReport
from fathom.api.local import LocalBackend
from fathom.config import ServeConfig
from fathom.types import InvalidRequest, Request, RequestOutput


class FusedReplica:
    """Owns one engine. Undecorated: ``app.build`` makes it a deployment.

    Raises:
        ConfigError, ModelError: if the engine cannot be built.
    """

    def __init__(self, config: ServeConfig) -> None:
        import torch

        from fathom.engine.async_engine import AsyncEngine

        # Two busy processes with more threads than cores between them slow each other down by
        # an order of magnitude, so the threads follow from what Ray reserved. First of all: the
        # engine measures its stages while it is built.
        threads = config.engine.threads or max(1, int(config.cpus_per_replica))
        torch.set_num_threads(threads)
        engine = AsyncEngine.from_config(dataclasses.replace(config.engine, threads=threads))
        self._engine = engine
        self._backend = LocalBackend(
            engine,
            name=serve.get_replica_context().replica_id.unique_id,
            interval_s=config.stream_interval_s,
        )

    async def generate(
        self, request: Request
    ) -> AsyncGenerator[list[RequestOutput] | InvalidRequest, None]:
        """Run a request; see ``Backend.generate``.

        An invalid request is an item, not an exception: Serve logs exceptions with their
        traceback as a replica's failure, and this one is the caller's.
        """
        try:
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

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here.

        Raises:
            EngineDead: if the engine has died.
        """
        self._engine.check_health()

    async def __del__(self) -> None:
        # Serve calls this after it has let the requests under way finish.
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.shutdown(0)
