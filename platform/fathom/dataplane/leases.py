"""Which blocks of a deep replica's pool belong to which client."""

from __future__ import annotations

import threading

from fathom.dataplane.protocol import ProtocolError


class Leases:
    """Ranges of blocks [1, num_blocks] that clients have, first fit."""

    def __init__(self, num_blocks: int) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = [(1, num_blocks)]

    @property
    def free(self) -> int:
        """Blocks in no lease."""
        with self._lock:
            return sum(count for _, count in self._free)

    def take(self, count: int) -> int:
        """Lease ``count`` blocks side by side; returns the first.

        Raises:
            ProtocolError: if there are none.
        """
        with self._lock:
            for index, (first, size) in enumerate(self._free):
                if 0 < count <= size:
                    self._free[index] = (first + count, size - count)
                    return first
            largest = max((size for _, size in self._free), default=0)
        raise ProtocolError(
            f"num_blocks: {count} deep KV blocks are wanted, {largest} can be had: lower the "
            "shallow replica's kv_cache_bytes, or add deep replicas."
        )

    def give_back(self, first: int, count: int) -> None:
        """End a lease."""
        with self._lock:
            self._free.append((first, count))
            merged: list[tuple[int, int]] = []
            for start, size in sorted(self._free):
                if merged and sum(merged[-1]) == start:
                    merged[-1] = (merged[-1][0], merged[-1][1] + size)
                elif size:
                    merged.append((start, size))
            self._free = merged
