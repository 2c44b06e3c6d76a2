"""What a drill needs of Ray: which processes serve now, and what the cluster still holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray import serve
from ray._private import internal_api, worker
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.state import state as gcs
from ray.exceptions import RayError
from ray.serve.context import _get_global_client

from deployments.journal import unfinished_streams
from deployments.peers import Endpoint
from deployments.shared import open_store
from fathom.config import Placement, ServeConfig, Topology
from fathom.drills.killer import Victim
from fathom.drills.leaks import Held, held_by_engines, read_metrics
from fathom.drills.plan import kinds_of

REPLICAS = {"ingress": "Ingress", "shallow": "Shallow", "deep": "Deep", "engine": "Engine"}
"""Deployments by the kind of their replicas."""

_ASK_S = 10.0


def hush() -> None:
    """Keep Ray from telling of each killed process in the middle of what the drill shows."""
    worker._worker_logs_enabled = False


def connect() -> Callable[[], None]:
    """Connect to the Ray of this machine, or of ``RAY_ADDRESS``; returns what disconnects.

    Clusters that Fathom starts ask for a token. By itself Ray would show the one that it keeps
    for this user only where ``RAY_AUTH_MODE`` says so.

    Raises:
        ConnectionError: if there is none.
    """
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    hush()
    disconnect: Callable[[], None] = ray.shutdown
    return disconnect


class Application:
    """A running application on a Ray that this process is connected to, all on this machine.

    See ``fathom.drills.killer.Prey``.

    Args:
        url, key: of its HTTP.

    Raises:
        LookupError: if Serve has no application of that name.
    """

    def __init__(self, name: str, config: ServeConfig, url: str, key: str = "") -> None:
        there = sorted(serve.status().applications)
        if name not in there:
            raise LookupError(f"Serve has no application {name!r}; it has {', '.join(there)}.")
        self._name = name
        self._config = config
        self._url = url
        self._key = key
        self._node = ray.get_runtime_context().get_node_id()
        self._store = open_store(config, name)
        self._objects_at_rest: int | None = None

    def ready(self, kind: str) -> list[Victim]:
        """See ``Prey.ready``.

        Ingresses are spared while the journal is away, and the journal while one of them is.
        """
        other = {"journal": "ingress", "ingress": "journal"}.get(kind)
        if other and len(self._present(other)) < self._wanted(other):
            return []
        return self._present(kind)

    def known_streams(self) -> int:
        """Live streams that the journal has; 0 while it does not answer."""
        try:
            return unfinished_streams(self._name)
        except RayError:
            return 0

    def fewest(self, kind: str) -> int:
        """See ``Prey.fewest``."""
        return 1 if kind == "journal" else 2

    def wait_until_whole(self, seconds: float) -> bool:
        """Wait until every pool has all of its processes; returns whether it came about."""
        deadline = time.monotonic() + seconds
        kinds = kinds_of(self._config)
        while any(len(self._present(kind)) < self._wanted(kind) for kind in kinds):
            if time.monotonic() > deadline:
                return False
            time.sleep(1.0)
        return True

    def mark_rest(self) -> None:
        """Take what Ray's object store holds now, beside KV blocks, for what it holds at rest."""
        self._objects_at_rest = self._objects()

    def held(self) -> Held:
        """What is held that should not be, if nothing is under way. See ``fathom.drills.leaks``."""
        wanted = self._config.serving.fewest
        try:
            metrics: Mapping[str, list[float]] = read_metrics(self._url, self._key)
        except OSError:
            return Held(unseen=wanted)
        engines = held_by_engines(metrics)
        leases, silent = self._spare_leases()
        objects = 0
        if self._objects_at_rest is not None:
            objects = max(0, self._objects() - self._objects_at_rest)
        return Held(
            requests=engines.requests,
            kv_caches=engines.kv_caches,
            leases=leases,
            objects=objects,
            streams=self.known_streams(),
            unseen=silent + max(0, wanted - len(metrics.get("fathom_num_requests_running", ()))),
        )

    # Processes

    def _replicas(self, deployment: str) -> list[Victim]:
        """Replicas that Serve sends requests to, and that live: it takes time to notice a death."""
        client = _get_global_client()
        assert client is not None  # it raises where there is none
        details = client.get_serve_details()
        application = details["applications"].get(self._name, {})
        replicas = application.get("deployments", {}).get(deployment, {}).get("replicas", ())
        return [
            Victim(each["replica_id"], each["pid"])
            for each in replicas
            if each["state"] == "RUNNING" and each["node_id"] == self._node
            if each["pid"] and _lives(each["pid"])
        ]

    def _actors(self, prefix: str, *, kind: str = "") -> list[Victim]:
        """Actors that live, by the beginning of their name, and by their class if it is given."""
        return [
            Victim(each["Name"] or f"{kind} {each['ActorID']}", each["Pid"])
            for each in gcs.actor_table(None, None, "ALIVE").values()
            if each["Name"].startswith(prefix) and kind in ("", each["ActorClassName"])
            if each["Address"]["NodeID"] == self._node and _lives(each["Pid"])
        ]

    def _present(self, kind: str) -> list[Victim]:
        if kind == "journal":
            return self._actors(f"journal-of-{self._name}")
        if kind == "directory":
            return self._actors(f"kv-store-of-{self._name}-")
        if kind == "deep" and self._config.placement is Placement.BESIDE:
            return self._actors("", kind="DeepActor")
        return self._replicas(REPLICAS[kind])

    def _wanted(self, kind: str) -> int:
        """Processes of a kind that there are when nothing has gone wrong."""
        config = self._config
        beside = config.placement is Placement.BESIDE
        return {
            "ingress": config.num_ingress_replicas,
            "deep": (config.shallow if beside else config.deep).fewest,
            "directory": config.store_shards,
            "journal": 1,
        }.get(kind, config.serving.fewest)

    # Leaks

    def _spare_leases(self) -> tuple[int, int]:
        """Leases beyond one for each live shallow replica, and deep replicas that are silent."""
        if self._config.topology is not Topology.DISAGGREGATED:
            return 0, 0
        # With a deep replica beside each shallow one, that one speaks for it.
        speaker = REPLICAS["shallow" if self._config.placement is Placement.BESIDE else "deep"]
        endpoints: Sequence[Any] = ()
        with suppress(RayError, TimeoutError):
            endpoints = (
                serve.get_deployment_handle(speaker, self._name)
                .broadcast("endpoint")
                .results(timeout_s=_ASK_S, return_exceptions=True)
            )
        found = [each for each in endpoints if isinstance(each, Endpoint)]
        taken = sum(self._config.leases - each.free_leases for each in found)
        spare = taken - len(self._present("shallow"))
        return max(0, spare), max(0, self._wanted("deep") - len(found))

    def _objects(self) -> int:
        """Objects in Ray's store that the KV store does not list."""
        listed = self._store.stats().objects if self._store is not None else 0
        reply = internal_api.get_memory_info_reply(gcs)  # type: ignore[no-untyped-call]
        return int(reply.store_stats.num_local_objects) - listed


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
