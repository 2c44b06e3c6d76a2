"""Which KV blocks are in use, shared, cached or free: counts and keys, no tensors."""

from __future__ import annotations

from collections import OrderedDict, deque

from fathom.kvstore.keys import BlockKey

NULL_BLOCK = 0
"""A block of zeros that is never handed out: padding of block tables points at it."""


class BlockAllocator:
    """Reference-counted blocks with a prefix cache over the unused ones.

    A block is *free* (no owner, no key), *cached* (no owner, but its key can still be looked up;
    evicted least recently used first) or *used* (one owner or more, with or without a key).

    Args:
        num_blocks: blocks of the pool, the null block included.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a KV pool needs at least 2 blocks, got {num_blocks}")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}
        self._free = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_usable(self) -> int:
        """Blocks that can be in use at once."""
        return self.num_blocks - 1

    def allocate(self) -> int:
        """Take a block for writing, evicting the least recently used cached one if need be.

        Raises:
            IndexError: when none is available; callers check ``num_available`` first.
        """
        if self._free:
            block = self._free.popleft()
        else:
            if not self._cached:
                raise IndexError("no KV block is available")
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add an owner to a used or cached block."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def release(self, block: int) -> bool:
        """Drop one owner; returns whether the block is free now: no owner left, and no key."""
        self._references[block] -= 1
        if self._references[block] > 0:
            return False
        if block in self._key_of:
            self._cached[block] = None
            return False
        self._free.append(block)
        return True

    def is_writable(self, block: int) -> bool:
        """Whether the one owner may write: neither shared nor published."""
        return self._references[block] == 1 and block not in self._key_of

    def publish(self, block: int, key: BlockKey) -> None:
        """Make a used block findable; the first block published under a key keeps it."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def lookup(self, key: BlockKey) -> int | None:
        """The block published under ``key``, if it is still there."""
        return self._block_of.get(key)

    def references(self, block: int) -> int:
        """Number of owners."""
        return self._references[block]

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]

    def check_integrity(self, owners: dict[int, int]) -> None:
        """Check every count against the owners' own tables.

        Args:
            owners: block -> number of block tables that hold it.

        Raises:
            AssertionError: naming what does not add up.
        """
        for block in range(1, self.num_blocks):
            expected = owners.get(block, 0)
            found = self._references[block]
            assert found == expected, f"block {block}: {found} references, {expected} owners"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        unowned = {b for b in range(1, self.num_blocks) if self._references[b] == 0}
        assert free | cached == unowned and not free & cached, "free and cached blocks overlap"
        assert all(block in self._key_of for block in cached), "a cached block has no key"
        assert {k: b for b, k in self._key_of.items()} == self._block_of, "keys and blocks differ"
        assert NULL_BLOCK not in owners, "the null block is in use"
