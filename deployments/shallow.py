"""The shallow replica: layers [0, k) and the exit head; its deep stage is in another process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayError
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.deep import DeepActor
from deployments.peers import Balance, Endpoint, Peers
from deployments.replica import Replica, engine_config
from deployments.shared import client_tls, credentials_of, open_store
from fathom.api.backend import ReplicaReport
from fathom.config import Placement, ServeConfig
from fathom.tuning.operating_points import OperatingPoints

logger = logging.getLogger("ray.serve")

ASK_TIMEOUT_S = 2.0
"""Seconds after which a deep replica that does not answer counts as not there."""

HUNG_S = 30.0
"""Seconds without an answer after which a deep replica of one's own is started anew; Serve has the
same patience with those that it watches."""


class ShallowReplica(Replica):
    """Drafts, and flushes to a deep replica. Undecorated: ``app.build`` makes it a deployment.

    With ``placement: beside`` it starts a deep replica of its own, in the second bundle of its
    placement group, and lends it to others that have lost theirs.

    Args:
        deep: handle of the deep replicas; None where each shallow replica has one beside it.

    Raises:
        ConfigError, ModelError: if the shallow stage cannot be built, or the operating points are
            another model's.
        DeepLost: if no deep replica takes this one in ``startup_timeout_s``, with the reasons.
    """

    def __init__(
        self,
        config: ServeConfig,
        deep: DeploymentHandle | None = None,
        points: OperatingPoints | None = None,
    ) -> None:
        settings = engine_config(config, config.shallow)

        from fathom.dataplane.client import RemoteDeepStage
        from fathom.dataplane.replicas import build_shallow

        context = serve.get_replica_context()
        self._beside = None
        if config.placement is Placement.BESIDE:
            self._beside = Beside(config, context.app_name)
            self._beside.start(config.startup_timeout_s)
        handle = deep or serve.get_deployment_handle(context.deployment, context.app_name)
        self._peers = Peers(
            lambda: _ask(self._beside, handle),
            node=ray.get_runtime_context().get_node_id(),
            name=context.replica_id.unique_id,
            refresh_s=config.data_plane.refresh_s,
        )
        credentials = credentials_of(context.app_name)
        engine = build_shallow(
            settings,
            self._peers,
            token=credentials.token,
            tls=client_tls(config.data_plane, credentials),
            deadline_s=config.data_plane.deadline_s,
            give_up_s=config.data_plane.give_up_s,
            wait_s=config.startup_timeout_s,
            on_lost=self._peers.failed,
            store=open_store(config, context.app_name),
        )
        assert isinstance(engine.deep, RemoteDeepStage)
        self._deep = engine.deep
        self._balance = Balance()
        super().__init__(config, engine, points)

    def report(self) -> ReplicaReport:
        """This replica's figures, its end of the data plane included.

        Raises:
            BackendUnavailable: if its engine has died.
        """
        report = super().report()
        return dataclasses.replace(report, stats={**report.stats, **self._deep.stats()})

    def check_health(self) -> None:
        """Called by Serve every few seconds; also the time to look for a less busy deep replica.

        Raises:
            EngineDead: if the engine has died.
        """
        super().check_health()
        if self._balance.should_move(self._deep.address, self._peers(), self._peers.endpoints):
            self._engine.move_deep()

    def endpoint(self) -> Endpoint | None:
        """Of the deep replica beside this one; None if there is none, or it does not answer."""
        return self._beside.latest if self._beside else None

    async def __del__(self) -> None:
        peers = getattr(self, "_peers", None)
        if peers is not None:
            peers.close()
        await super().__del__()
        beside = getattr(self, "_beside", None)
        if beside is not None:
            await asyncio.to_thread(beside.close)


class Beside:
    """A deep replica in the second bundle of this replica's placement group.

    Ray starts it anew when it dies, and ends it with this replica.
    """

    def __init__(self, config: ServeConfig, application: str) -> None:
        group = ray.util.get_current_placement_group()
        assert group is not None  # app.build asks Serve for one
        self._actor: Any = (
            ray.remote(DeepActor)
            .options(
                num_cpus=config.deep.cpus,
                max_restarts=-1,
                max_concurrency=4,  # questions are answered while another thread is busy
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=1
                ),
            )
            .remote(config, application)
        )
        # When it last did; None while it loads, for which it may take its time.
        self._answered: float | None = None
        self.latest: Endpoint | None = None

    def start(self, timeout_s: float) -> None:
        """Wait until it listens.

        Raises:
            RayError: if it does not, with its reason.
        """
        self.latest = ray.get(self._actor.endpoint.remote(), timeout=timeout_s)
        self._answered = time.monotonic()

    def ask(self) -> Endpoint | None:
        """Ask it how it does; a deep replica that has long been silent is started anew."""
        try:
            self.latest = ray.get(self._actor.endpoint.remote(), timeout=ASK_TIMEOUT_S)
            self._answered = time.monotonic()
        except GetTimeoutError:
            self.latest = None
            if self._answered is not None and time.monotonic() - self._answered > HUNG_S:
                logger.warning("The deep replica beside this one is silent; starting it anew.")
                self._answered = None
                ray.kill(self._actor, no_restart=False)
        except RayError:  # it died; Ray is starting it anew
            self.latest = self._answered = None
        return self.latest

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(RayError):
            ray.kill(self._actor)


def _ask(beside: Beside | None, handle: DeploymentHandle) -> Sequence[Endpoint]:
    """The deep replicas that answer: the one beside, and those that the handle leads to."""
    own = beside.ask() if beside else None
    found = {own.address: own} if own else {}
    # A pool without a running replica raises, which must not hide one's own.
    with contextlib.suppress(Exception):
        answers = handle.broadcast("endpoint").results(
            timeout_s=ASK_TIMEOUT_S, return_exceptions=True
        )
        for each in answers:
            if isinstance(each, Endpoint):
                found.setdefault(each.address, each)
    return list(found.values())
