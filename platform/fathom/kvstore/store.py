"""What a store of KV blocks does for the replicas that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fathom.kvstore.keys import BlockKey

Block = NDArray[np.uint8]
"""Keys and values of one block in all layers of a stage, then, for a shallow stage, the exit
states of its rows: raw bytes, in an order that the key's root fixes. Blocks that a store gives out
are read-only."""


class BlocksGone(LookupError):
    """Blocks that were found cannot be had any more: a cache miss, never an error of a request."""


class Hits(Protocol):
    """Leading blocks of a prefix that the store has; they stay while this object lives."""

    def __len__(self) -> int:
        """How many."""
        ...

    def fetch(self, start: int = 0) -> Sequence[Block]:
        """Those from number ``start`` on, in order.

        Raises:
            BlocksGone: if one is lost, or they do not come in time.
        """
        ...


class KVStore(Protocol):
    """Immutable blocks by key. Losing any of them costs hits, never correctness. Thread-safe."""

    def lookup(self, keys: Sequence[BlockKey]) -> Hits:
        """Find the blocks of a prefix in one call.

        Args:
            keys: of one chain (``keys.extend_keys``), in order, from its first block on.
        """
        ...

    def publish(self, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> None:
        """Offer blocks to others. Returns at once; what cannot be taken is dropped.

        Args:
            keys: of one chain, from its first block on.
            blocks: of the last ``len(blocks)`` keys, all of one size.
        """
        ...


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Figures of a store. blocks, bytes: held. lookups: calls; hits: blocks found.

    objects: references that the blocks lie behind.
    """

    blocks: int = 0
    bytes: int = 0
    lookups: int = 0
    hits: int = 0
    evicted: int = 0
    objects: int = 0

    def __add__(self, other: StoreStats) -> StoreStats:
        return StoreStats(
            self.blocks + other.blocks,
            self.bytes + other.bytes,
            self.lookups + other.lookups,
            self.hits + other.hits,
            self.evicted + other.evicted,
            self.objects + other.objects,
        )
