"""What one shard of the store's directory lists: which blocks, which of them goes first.

Free of Ray: a reference is whatever ``publish`` is given to make one with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from fathom.kvstore.keys import BlockKey
from fathom.kvstore.store import StoreStats

Reference = TypeVar("Reference")


class ShardIndex(Generic[Reference]):
    """References to blocks by key, least recently used out first. Not thread-safe.

    A block is of use only with all blocks before it in its chain, so a block has always been used
    less recently than the one before it: what is evicted is the end of some chain, and all that is
    listed can be found.

    Args:
        budget_bytes: of all listed blocks together. Blocks that were evicted while somebody holds
            a reference to them live on, and are not counted.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._blocks: OrderedDict[BlockKey, tuple[Reference, int]] = OrderedDict()
        self._bytes = self._lookups = self._hits = self._evicted = 0
        # A size is the same for almost all blocks: one int object for all of them.
        self._sizes: dict[int, int] = {}

    def lookup(self, keys: Sequence[BlockKey]) -> list[Reference]:
        """References to the leading keys that are here.

        Args:
            keys: of one chain, from its first block on.
        """
        blocks = self._blocks
        found: list[Reference] = []
        for key in keys:
            entry = blocks.get(key)
            if entry is None:
                break
            found.append(entry[0])
        self._touch(keys, len(found))
        self._lookups += 1
        self._hits += len(found)
        return found

    def publish(
        self, keys: Sequence[BlockKey], sizes: Sequence[int], put: Callable[[int], Reference]
    ) -> int:
        """List blocks, as many of the leading ones as the budget holds.

        Those that are here already are left as they are. Where the chain's block before them is
        not here, none is taken: nobody could find them.

        Args:
            keys: of one chain, from its first block on.
            sizes: bytes of the blocks of the last ``len(sizes)`` keys.
            put: makes the reference to the block of ``sizes[index]``; called for new blocks only.

        Returns:
            How many were taken.
        """
        blocks = self._blocks
        before = len(keys) - len(sizes)
        present = 0
        while present < len(keys) and keys[present] in blocks:
            present += 1
        self._touch(keys, present)
        if present < before:
            return 0
        own = sum(blocks[key][1] for key in keys[:present])
        taken = 0
        for index in range(present - before, len(sizes)):
            key, size = keys[before + index], sizes[index]
            if own + size > self._budget:
                break
            if key in blocks:  # where a publisher gave no chain
                blocks.move_to_end(key)
            else:
                # The chain itself was touched last: all else goes before any of it.
                self._evict(size)
                blocks[key] = put(index), self._sizes.setdefault(size, size)
                self._bytes += size
                taken += 1
            own += size
            present += 1
        self._touch(keys, present)
        return taken

    def stats(self) -> StoreStats:
        """See ``StoreStats``."""
        return StoreStats(len(self._blocks), self._bytes, self._lookups, self._hits, self._evicted)

    def _evict(self, size: int) -> None:
        """Make room for ``size`` bytes."""
        while self._bytes + size > self._budget:
            _, (_, freed) = self._blocks.popitem(last=False)
            self._bytes -= freed
            self._evicted += 1

    def _touch(self, keys: Sequence[BlockKey], count: int) -> None:
        """Mark the first ``count`` keys as used, the first of them last."""
        move_to_end = self._blocks.move_to_end
        for index in range(count - 1, -1, -1):
            move_to_end(keys[index])
