"""Consistent hashing: names on a ring of hashes, so that few sessions move when replicas do."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator


class HashRing:
    """Names spread over a ring; a key belongs to the first name clockwise of its hash.

    A name that joins takes over about 1/n of the keys, all for itself; one that leaves gives only
    its own away. Rings of equal names agree, in whatever process and order they came to be.

    Args:
        points: of each name on the ring, at least 1. The largest share of keys exceeds the mean
            by about 3 / sqrt(points).
    """

    def __init__(self, points: int = 64) -> None:
        self._points = points
        self._names: set[str] = set()
        self._hashes: list[int] = []
        self._owners: list[str] = []

    def __len__(self) -> int:
        return len(self._names)

    def update(self, names: Iterable[str]) -> None:
        """Let the ring have exactly these names."""
        wanted = set(names)
        if wanted == self._names:
            return
        ring = [pair for pair in zip(self._hashes, self._owners, strict=True) if pair[1] in wanted]
        ring += [
            (_hash(f"{name}#{point}"), name)
            for name in wanted - self._names
            for point in range(self._points)
        ]
        ring.sort()
        self._hashes = [value for value, _ in ring]
        self._owners = [name for _, name in ring]
        self._names = wanted

    def walk(self, key: str) -> Iterator[str]:
        """All names, the key's own first, then as they follow on the ring. Ends with a change."""
        owners = self._owners
        start = bisect_right(self._hashes, _hash(key))
        seen = set()
        for index in range(len(owners)):
            name = owners[(start + index) % len(owners)]
            if name not in seen:
                seen.add(name)
                yield name


def _hash(text: str) -> int:
    # Not hash(): that differs from process to process.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
