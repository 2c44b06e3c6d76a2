"""The deep replica: layers [k, L) and the LM head, behind the data plane's port.

Serve places it, watches it and scales it. Flushes do not come through Serve but by the port; see
``fathom.dataplane``.
"""

from __future__ import annotations

import asyncio
import time

import ray
from ray import serve
from ray.util import get_node_ip_address

from deployments.autoscaling import BUSY, CLIENTS, QUEUE_S
from deployments.peers import Endpoint
from deployments.replica import engine_config
from deployments.shared import credentials_of, end_if_deleted, open_store, server_tls
from fathom.config import ServeConfig


class DeepActor:
    """Answers the flushes of shallow replicas, as a plain Ray actor.

    Args:
        application: whose credentials and KV store it takes.

    Raises:
        ConfigError, ModelError: if the deep stage cannot be built.
    """

    def __init__(self, config: ServeConfig, application: str) -> None:
        settings = engine_config(config, config.deep)

        from fathom.dataplane.replicas import start_deep

        self._node: str = ray.get_runtime_context().get_node_id()
        self._leases = config.leases
        credentials = credentials_of(application)
        host = config.data_plane.host or str(get_node_ip_address())  # type: ignore[no-untyped-call]
        self._host = start_deep(
            settings,
            leases=config.leases,
            token=credentials.token,
            host=host,
            tls=server_tls(config.data_plane, credentials, host),
            store=open_store(config, application),
        )

    def endpoint(self) -> Endpoint:
        """Where it listens, and how it does."""
        stats = self._host.stats()
        return Endpoint(
            address=self._host.address,
            node=self._node,
            free_leases=int(stats["free_leases"]),
            queue_s=stats["flush_queue_seconds"],
        )

    def report(self) -> dict[str, float]:
        """This replica's figures."""
        return self._host.stats()

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here.

        Raises:
            RuntimeError: if the deep stage or its port is gone.
        """
        self._host.check_health()


class DeepReplica(DeepActor):
    """The same as a deployment, which ``app.build`` makes of it."""

    def __init__(self, config: ServeConfig) -> None:
        self._application: str = serve.get_replica_context().app_name
        self._busy = (time.monotonic(), 0.0)
        super().__init__(config, self._application)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: how long flushes wait, and the share of time that passes take."""
        stats = self._host.stats()
        since, passes = self._busy
        now = time.monotonic()
        self._busy = (now, stats["deep_passes"])
        seconds = (stats["deep_passes"] - passes) * stats["deep_pass_seconds"]
        return {
            QUEUE_S: stats["flush_queue_seconds"],
            BUSY: min(1.0, seconds / max(now - since, 1e-3)),
            CLIENTS: self._leases - stats["free_leases"],
        }

    async def __del__(self) -> None:
        host = getattr(self, "_host", None)
        if host is not None:
            await asyncio.to_thread(host.close)
            await asyncio.to_thread(end_if_deleted, self._application)
