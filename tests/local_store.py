"""A KV store in this process, with the blocks themselves for references."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from fathom.kvstore.keys import BlockKey
from fathom.kvstore.store import Block, BlocksGone


class LocalStore:
    """See ``fathom.kvstore.store.KVStore``.

    Attributes:
        lose_fetches: found blocks cannot be had. fetched, published: blocks so far.
    """

    def __init__(self, budget_bytes: int = 1 << 30) -> None:
        self._budget = budget_bytes
        self._blocks: OrderedDict[BlockKey, Block] = OrderedDict()
        self._lock = threading.Lock()
        self.lose_fetches = False
        self.fetched = self.published = 0

    def lookup(self, keys: Sequence[BlockKey]) -> LocalHits:
        with self._lock:
            found = []
            for key in keys:
                if key not in self._blocks:
                    break
                found.append(self._blocks[key])
            self._touch(keys[: len(found)])
            return LocalHits(self, found)

    def publish(self, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> None:
        with self._lock:
            for key, block in zip(keys[-len(blocks) :], blocks, strict=True):
                own = block.copy()
                own.flags.writeable = False
                self._blocks[key] = own
                self.published += 1
            self._touch([key for key in keys if key in self._blocks])
            while sum(block.nbytes for block in self._blocks.values()) > self._budget:
                self._blocks.popitem(last=False)

    def _touch(self, keys: Sequence[BlockKey]) -> None:
        """Mark as used, the first of a chain last: without it the others cannot be found."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """Lose blocks."""
        for key in keys:
            del self._blocks[key]


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
