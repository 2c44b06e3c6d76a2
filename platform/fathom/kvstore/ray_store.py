"""KV blocks in Ray's object store, with a directory sharded over actors.

An object of Ray's dies with the process that owns it. So a block that a replica publishes is put
into the object store once more by the shard that lists it: the replica may go, the block stays. A
shard that dies takes its blocks along and comes back empty.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fathom.kvstore.keys import BlockKey
from fathom.kvstore.shard import ShardIndex
from fathom.kvstore.store import Block, BlocksGone, StoreStats

NAMESPACE = "fathom"
START_TIMEOUT_S = 30.0
LOOKUP_TIMEOUT_S = 0.5
FETCH_TIMEOUT_S = 3.0
MAX_PUBLISHES_AWAY = 64
_PAUSE_AFTER_FAILURE_S = 5.0

Piece = tuple["ray.ObjectRef[Block]", int]
"""Blocks [extent, bytes] in the object store, and how many of the leading ones are meant."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class StoreShard:
    """Lists and owns the blocks of some chains, least recently used out first.

    Args:
        budget_bytes: of all blocks together. Ray spills what memory does not hold.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._index: ShardIndex[ray.ObjectRef[Block]] = ShardIndex(budget_bytes)

    def lookup(self, keys: Sequence[BlockKey]) -> list[Piece]:
        """See ``ShardIndex.lookup``; who holds the references keeps the blocks alive."""
        return self._index.lookup(keys)

    def publish(self, keys: Sequence[BlockKey], blocks: Block) -> None:
        """Take blocks; see ``ShardIndex.publish``.

        Args:
            blocks: [count, bytes], those of the last keys.
        """
        count, size = blocks.shape
        self._index.publish(keys, count, size, lambda first, last: ray.put(blocks[first:last]))

    def stats(self) -> StoreStats:
        """See ``StoreStats``."""
        return self._index.stats()


def store_name(application: str) -> str:
    """Name of the store that an application's replicas share."""
    return f"kv-store-of-{application}"


def find_store(name: str) -> list[Any]:
    """The shards of a store that somebody has started.

    Raises:
        LookupError: if there is none of this name.
    """
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = {each["name"] for each in actors if each["namespace"] == NAMESPACE}
    count = sum(each.startswith(f"{name}-") and each[len(name) + 1 :].isdigit() for each in names)
    # Where a chain lies depends on how many shards there are: all of them, or none.
    if not count or not names >= {f"{name}-{index}" for index in range(count)}:
        raise LookupError(f"no KV store {name!r} on this Ray cluster: start its replicas first.")
    return [ray.get_actor(f"{name}-{index}", namespace=NAMESPACE) for index in range(count)]


def start_store(name: str, *, shards: int, budget_bytes: int) -> list[Any]:
    """The shards of a store, started where there are none of this name.

    They outlive who starts them; ``stop_store`` ends them.

    Args:
        budget_bytes: of all shards together.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    found = []
    for index in range(shards):
        place = NodeAffinitySchedulingStrategy(nodes[index % len(nodes)], soft=True)
        found.append(
            StoreShard.options(  # type: ignore[attr-defined]
                name=f"{name}-{index}",
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                scheduling_strategy=place,
            ).remote(budget_bytes // shards)
        )
    with contextlib.suppress(RayError):  # a first lookup must not find them still starting
        ray.get([shard.stats.remote() for shard in found], timeout=START_TIMEOUT_S)
    return found


def stop_store(name: str, *, shards: int) -> None:
    """End a store's shards, and with them its blocks."""
    for index in range(shards):
        try:
            ray.kill(ray.get_actor(f"{name}-{index}", namespace=NAMESPACE))
        except ValueError:
            continue  # it is not there


class RayKVStore:
    """A client of a store; see ``fathom.kvstore.store.KVStore``.

    A shard that fails or hangs is left alone for a few seconds: no request waits for it twice.
    """

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = list(shards)
        self._avoid_until = [0.0] * len(self._shards)
        self._away: deque[ray.ObjectRef[None]] = deque()
        self._lock = threading.Lock()  # of what is away; the rest is written whole

    def lookup(self, keys: Sequence[BlockKey]) -> RayHits:
        """See ``KVStore.lookup``."""
        if not keys:
            return RayHits([])
        index = self._place(keys)
        if time.monotonic() < self._avoid_until[index]:
            return RayHits([])
        try:
            answer = self._shards[index].lookup.remote(list(keys))
            return RayHits(ray.get(answer, timeout=LOOKUP_TIMEOUT_S))
        except RayError:
            self._avoid_until[index] = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            return RayHits([])

    def publish(self, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> None:
        """See ``KVStore.publish``."""
        if not blocks:
            return
        index = self._place(keys)
        if time.monotonic() < self._avoid_until[index]:
            return
        with self._lock:
            if self._away:
                _, away = ray.wait(list(self._away), num_returns=len(self._away), timeout=0)
                self._away = deque(away)
            if len(self._away) < MAX_PUBLISHES_AWAY:
                # One array: each argument of a call costs the shard more than its bytes do.
                shard, rows = self._shards[index], np.stack(blocks)
                self._away.append(shard.publish.remote(list(keys), rows))

    def stats(self) -> StoreStats:
        """Of all shards that answer."""
        total = StoreStats()
        for shard in self._shards:
            try:
                total += ray.get(shard.stats.remote(), timeout=LOOKUP_TIMEOUT_S)
            except RayError:
                continue
        return total

    def _place(self, keys: Sequence[BlockKey]) -> int:
        """The shard of a chain: all blocks of a prefix lie at one, found in one call."""
        # By the first key, so chains with one system prompt share a shard, and about 1,000
        # lookups/s is what it can do. A later key would spread them, but where chains part differs
        # from one system prompt to the next, and a chain that grew beyond that key would be sought
        # where its beginning is not. Clients that choose among copies would find less of what
        # others published. A shard that is asked too much times out and is left alone: that
        # costs hits, and a replica asks for no blocks that it has itself.
        return int.from_bytes(keys[0][:8], "little") % len(self._shards)


class RayHits:
    """References to leading blocks; see ``fathom.kvstore.store.Hits``."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = list(pieces)
        self._count = sum(count for _, count in self._pieces)

    def __len__(self) -> int:
        return self._count

    def fetch(self, start: int = 0) -> Sequence[Block]:
        """See ``Hits.fetch``: one get for all."""
        wanted: list[tuple[ray.ObjectRef[Block], int, int]] = []
        first = 0
        for reference, count in self._pieces:
            if start < first + count:
                wanted.append((reference, max(0, start - first), count))
            first += count
        try:
            found = ray.get([reference for reference, _, _ in wanted], timeout=FETCH_TIMEOUT_S)
        except RayError as error:
            raise BlocksGone(str(error).partition("\n")[0]) from error
        blocks: list[Block] = []
        for rows, (_, begin, end) in zip(found, wanted, strict=True):
            blocks += list(np.asarray(rows)[begin:end])
        return blocks
