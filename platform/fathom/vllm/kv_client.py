"""The KV store of a Fathom application, from a process of vLLM's."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from fathom.kvstore.store import KVStore

_log = logging.getLogger(__name__)

RETRY_S = 30.0
_OUTLIVE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_clients: dict[tuple[str, str], StoreClient] = {}


class StoreClient:
    """Connects to Ray and finds the store's shards, never in a request's way.

    Looks again every ``RETRY_S``: a store may come, go, and be started anew under its name.

    Args:
        address: of the Ray cluster, as in ``ray.init``; empty: the one of this machine, or the one
            that ``RAY_ADDRESS`` names. A connection that the process has is used as it is.
        name: of the store.
    """

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._name = name
        self._shards: list[Any] = []
        self._store: KVStore | None = None
        self._tried_at = -RETRY_S
        self._lock = threading.Lock()

    def __call__(self) -> KVStore | None:
        """The store as it was last found, or None."""
        if time.monotonic() - self._tried_at > RETRY_S:
            self._tried_at = time.monotonic()
            threading.Thread(target=self.connect, name="fathom-vllm-ray", daemon=True).start()
        return self._store

    def connect(self) -> None:
        """Try once, now. What goes wrong is logged."""
        if not self._lock.acquire(blocking=False):
            return  # a try is under way; without a cluster it may take long
        try:
            self._tried_at = time.monotonic()
            shards = _find(self._address, self._name)
        except Exception as error:  # Ray's errors of a cluster that is not there are many
            self._shards, self._store = [], None
            _log.warning(
                "no KV store %r: %s; prefixes are not shared, next try in %.0f s",
                self._name,
                str(error).partition("\n")[0],
                RETRY_S,
            )
        else:
            if shards != self._shards:
                self._shards, self._store = shards, _client(shards)
        finally:
            self._lock.release()


def client_of(settings: Mapping[str, Any]) -> StoreClient:
    """The client that this process has for a store; vLLM's two halves share it.

    Args:
        settings: ``ray_address``, and the store's name: ``store``, or that of a Serve
            ``application``.
    """
    from fathom.kvstore.ray_store import store_name

    address = str(settings.get("ray_address", ""))
    name = str(settings.get("store") or store_name(str(settings.get("application", "default"))))
    key = (address, name)
    if key not in _clients:
        _clients[key] = StoreClient(address, name)
        _clients[key].connect()
    return _clients[key]


def _find(address: str, name: str) -> list[Any]:
    import ray

    from fathom.kvstore.ray_store import NAMESPACE, find_store

    if not ray.is_initialized():
        # Ray ends a process whose cluster has been gone for a minute; vLLM's has to stay.
        os.environ.setdefault(_OUTLIVE, str(10 * 365 * 24 * 3600))
        ray.init(
            address or "auto", namespace=NAMESPACE, log_to_driver=False, configure_logging=False
        )
    return find_store(name)


def _client(shards: list[Any]) -> KVStore:
    from fathom.kvstore.ray_store import RayKVStore

    return RayKVStore(shards)
