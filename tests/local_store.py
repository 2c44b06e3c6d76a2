"""A KV store in this process: a shard's real directory, with blocks for references."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fathom.kvstore.keys import BlockKey
from fathom.kvstore.shard import ShardIndex
from fathom.kvstore.store import Block, BlocksGone


class LocalStore:
    """See ``fathom.kvstore.store.KVStore``.

    Attributes:
        lose_fetches: found blocks cannot be had. lost_chains: first keys of chains that are not
            found. fetched, published: blocks so far.
    """

    def __init__(self, budget_bytes: int = 1 << 30) -> None:
        self._index: ShardIndex[list[Block]] = ShardIndex(budget_bytes)
        self._lock = threading.Lock()
        self.lose_fetches = False
        self.lost_chains: set[BlockKey] = set()
        self.fetched = self.published = 0

    def lookup(self, keys: Sequence[BlockKey]) -> LocalHits:
        if self.lost_chains.intersection(keys[:1]):
            return LocalHits(self, [])
        with self._lock:
            pieces = self._index.lookup(keys)
        return LocalHits(self, [block for blocks, count in pieces for block in blocks[:count]])

    def publish(self, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> None:
        with self._lock:
            copies = [block.copy() for block in blocks]
            for copy in copies:
                copy.flags.writeable = False
            self.published += self._index.publish(
                keys, len(copies), copies[0].nbytes, lambda first, last: copies[first:last]
            )


class LocalHits:
    def __init__(self, store: LocalStore, blocks: Sequence[Block]) -> None:
        self._store = store
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def fetch(self, start: int = 0) -> Sequence[Block]:
        if self._store.lose_fetches:
            raise BlocksGone("lost")
        self._store.fetched += len(self._blocks) - start
        return self._blocks[start:]
