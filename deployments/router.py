"""Serve's request router for the replicas behind the ingress: ``fathom.routing`` at a handle.

A deployment takes it by::

    from ray.serve.config import RequestRouterConfig
    from deployments.router import ROUTER

    serve.deployment(..., request_router_config=RequestRouterConfig(
        request_router_class=ROUTER,
        request_router_kwargs=dataclasses.asdict(RoutingConfig()),  # or {} for the defaults
    ))(FusedReplica)

Each process that holds a handle has a router of its own, and so has each ingress. They agree on
sessions, because the ring follows from the names of the replicas alone. Their memories of prefixes
are their own: a prefix is then computed, or fetched from the KV store, once for each ingress at
worst, and a replica serves it to both from then on. Each counts its own requests exactly and learns
of the others' from what a replica reports with each request that it accepts. One that accepts
nothing for some seconds (it hangs, and Serve's health check has not noticed yet) gets no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from fathom.routing.policy import RoutingConfig, RoutingPolicy
from fathom.settings import from_mapping
from fathom.types import Request

ROUTER = "deployments.router.FathomRouter"
"""Of ``RequestRouterConfig.request_router_class``."""
METHOD = "generate"
"""Calls of it carry a request, as their first argument; others go to the least loaded replica."""
BURIED_FOR_S = 60.0
"""Serve's controller may list a dead replica again until its own health check has failed."""


class FathomRouter(RequestRouter):
    """Session's replica, prefix's replica, or the least loaded; see ``RoutingPolicy``.

    Never waits for a replica to choose one. Serve gives the keyword arguments of the deployment's
    ``request_router_kwargs`` to ``initialize_state``.
    """

    def initialize_state(self, **settings: Any) -> None:
        """Called by Serve after the constructor.

        Raises:
            ConfigError: for settings that ``RoutingConfig`` does not take.
        """
        config = from_mapping(RoutingConfig, settings)
        config.validate()
        self._policy = RoutingPolicy(config)
        self._buried: dict[ReplicaID, float] = {}
        self._by_name: dict[str, RunningReplica] = {}
        self._routed_by: WeakKeyDictionary[asyncio.Task[Any], PendingRequest] = WeakKeyDictionary()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The one replica for a request; called by Serve, again if it did not take it."""
        if not candidate_replicas:
            return []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # before a second try
            self._routed_by[_this_task()] = pending_request
        choice = self._policy.choose(_request_of(pending_request))
        return [[self._by_name[choice.replica]]]

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        # Serve would ask a replica that it has not heard of for some seconds, and wait.
        return self._replicas.get(candidates[0].replica_id)

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: Any = None
    ) -> None:
        # Serve would look the call up by an id that all calls for one HTTP request have in common:
        # of several that wait at once, one a prompt, all but the first would wait for ever.
        pending = self._routed_by.pop(_this_task(), None)
        if pending is not None and not pending.future.done():
            self._record_queue_wait_time(pending)
            pending.future.set_result(replica)
            self._remove_pending_request_from_indices(pending)

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        """Called by Serve with all replicas that its controller knows to be running."""
        now = time.monotonic()
        self._buried = {key: until for key, until in self._buried.items() if until > now}
        super().update_replicas([r for r in replicas if r.replica_id not in self._buried])
        self._replicas_changed()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a call has found the replica dead."""
        super().on_replica_actor_died(replica_id)
        self._buried[replica_id] = time.monotonic() + BURIED_FOR_S
        self._replicas_changed()

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a call did not reach the replica."""
        super().on_replica_actor_unavailable(replica_id)
        self._policy.unreachable(replica_id.unique_id)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve for every call, broadcasts included."""
        super().on_send_request(replica_id)
        self._policy.started(replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a call that was sent is over, however it went."""
        super().on_request_completed(replica_id, internal_request_id)
        self._policy.ended(replica_id.unique_id)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Called by Serve when a replica accepts or rejects a request, with all that it has."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._policy.reported(replica_id.unique_id, num_ongoing_requests)

    def _replicas_changed(self) -> None:
        self._by_name = {key.unique_id: replica for key, replica in self._replicas.items()}
        self._policy.update(self._by_name)


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # Serve routes every call in a task
    return task


def _request_of(pending: PendingRequest | None) -> Request | None:
    if pending is None or pending.metadata.call_method != METHOD or not pending.args:
        return None
    request = pending.args[0]
    return request if isinstance(request, Request) else None
