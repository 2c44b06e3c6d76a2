"""Whose keys and values lie in which block of a pool: a block table for each sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fathom.attention.backend import SequenceRows
from fathom.attention.blocks import BlockAllocator
from fathom.attention.pool import BlockStorage
from fathom.kvstore.keys import BlockKey


@dataclass(slots=True)
class _Table:
    blocks: list[int] = field(default_factory=list)
    length: int = 0


class PagedKVCache:
    """Block tables of many sequences over one pool, with sharing and a prefix cache.

    Length counts positions with room in the table; writing them is the attention backend's job.
    Not thread-safe: one engine owns it.

    Args:
        num_blocks: blocks of the pool, one of which is the null block of zeros.
        block_size: tokens a block.
        storage: where the blocks lie.
    """

    def __init__(self, num_blocks: int, block_size: int, storage: BlockStorage) -> None:
        self.block_size = block_size
        self._storage = storage
        self._allocator = BlockAllocator(num_blocks)
        self._tables: dict[int, _Table] = {}

    def clear(self) -> None:
        """Forget every table and every published block: what they pointed at is gone."""
        self._allocator = BlockAllocator(self._allocator.num_blocks)
        self._tables.clear()

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that sequences can own."""
        return self._allocator.num_usable

    @property
    def num_available_blocks(self) -> int:
        """Blocks that can still be handed out, cached ones included."""
        return self._allocator.num_available

    def blocks_for(self, length: int) -> int:
        """Blocks that ``length`` tokens take."""
        return -(-length // self.block_size)

    def length(self, seq_id: int) -> int:
        """Positions that a sequence has room for."""
        return self._tables[seq_id].length

    def block_table(self, seq_id: int) -> list[int]:
        """The sequence's blocks in order. Do not change it."""
        return self._tables[seq_id].blocks

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._tables

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading keys whose blocks are in the pool. Changes nothing."""
        for index, key in enumerate(keys):
            if self._allocator.lookup(key) is None:
                return index
        return len(keys)

    def num_unowned(self, keys: Sequence[BlockKey]) -> int:
        """How many of these published blocks have no owner, and so count as available."""
        blocks = (self._allocator.lookup(key) for key in keys)
        return sum(b is not None and self._allocator.references(b) == 0 for b in blocks)

    def open(self, seq_id: int, keys: Sequence[BlockKey] = ()) -> None:
        """Start a sequence's table with the published blocks of ``keys``.

        Raises:
            ValueError: if the sequence is open already.
            KeyError: if a key is not in the pool (check with ``match`` first).
        """
        if seq_id in self._tables:
            raise ValueError(f"sequence {seq_id} is open already")
        table = _Table()
        for key in keys:
            block = self._allocator.lookup(key)
            if block is None:
                for taken in table.blocks:
                    self._allocator.release(taken)
                raise KeyError(key.hex())
            self._allocator.share(block)
            table.blocks.append(block)
        table.length = len(keys) * self.block_size
        self._tables[seq_id] = table

    def blocks_needed(self, seq_id: int, length: int) -> int:
        """Blocks that growing to ``length`` would take from the pool, copies on write included."""
        table = self._tables[seq_id]
        needed = max(0, self.blocks_for(length) - len(table.blocks))
        return needed + (length > table.length and self._last_block_is_foreign(table))

    def grow(self, seq_id: int, length: int) -> bool:
        """Make room for positions [current length, ``length``).

        A partly filled last block that is shared or published is copied first, so that writing
        never shows in another sequence.

        Returns:
            False, with nothing changed, if the pool has too few blocks.
        """
        table = self._tables[seq_id]
        if self.blocks_needed(seq_id, length) > self._allocator.num_available:
            return False
        if length <= table.length:
            return True
        if self._last_block_is_foreign(table):
            source = table.blocks[-1]
            copy = self._allocator.allocate()
            self._storage.copy_block(source, copy)
            self._allocator.release(source)
            table.blocks[-1] = copy
        while len(table.blocks) < self.blocks_for(length):
            table.blocks.append(self._allocator.allocate())
        table.length = length
        return True

    def truncate(self, seq_id: int, length: int) -> None:
        """Forget positions from ``length`` on and give their blocks back. Never grows."""
        table = self._tables[seq_id]
        while len(table.blocks) > self.blocks_for(length):
            self._allocator.release(table.blocks.pop())
        table.length = min(table.length, length)

    def fork(self, parent_id: int, child_id: int, length: int) -> None:
        """Open a sequence that shares the parent's first ``length`` positions.

        Raises:
            ValueError: if the child is open already or the parent is shorter than ``length``.
        """
        parent = self._tables[parent_id]
        if child_id in self._tables:
            raise ValueError(f"sequence {child_id} is open already")
        if length > parent.length:
            raise ValueError(f"cannot fork at {length}: the parent has {parent.length} positions")
        blocks = parent.blocks[: self.blocks_for(length)]
        for block in blocks:
            self._allocator.share(block)
        self._tables[child_id] = _Table(list(blocks), length)

    def publish(self, seq_id: int, keys: Sequence[BlockKey]) -> None:
        """Make the sequence's leading full blocks findable under ``keys``, one key a block.

        The caller vouches that these positions are written and final.
        """
        for block, key in zip(self._tables[seq_id].blocks, keys, strict=False):
            self._allocator.publish(block, key)

    def free(self, seq_id: int, *, scrub: bool = False) -> None:
        """Close a sequence and give its blocks back.

        Args:
            scrub: zero the blocks that become free: non-finite values would otherwise leak
                through masked positions (0 * NaN is NaN). Published blocks are final and stay.
        """
        # Last block first: leading blocks, which more prefixes share, are evicted later.
        for block in reversed(self._tables.pop(seq_id).blocks):
            if self._allocator.release(block) and scrub:
                self._storage.zero_block(block)

    def rows(self, seq_id: int, start: int, num_rows: int) -> SequenceRows:
        """A sequence's rows at positions [start, start + num_rows), which it has room for."""
        blocks = self._tables[seq_id].blocks[: self.blocks_for(start + num_rows)]
        return SequenceRows(blocks, start, num_rows)

    def _last_block_is_foreign(self, table: _Table) -> bool:
        partly_filled = table.length % self.block_size != 0
        return partly_filled and not self._allocator.is_writable(table.blocks[-1])

    def check_integrity(self, open_sequences: Iterable[int] | None = None) -> None:
        """Check tables against the allocator, and against the sequences said to be open.

        Raises:
            AssertionError: naming what does not add up.
        """
        owners = Counter(block for table in self._tables.values() for block in table.blocks)
        self._allocator.check_integrity(owners)
        for seq_id, table in self._tables.items():
            expected = self.blocks_for(table.length)
            assert len(table.blocks) == expected, f"sequence {seq_id}: table and length differ"
        if open_sequences is not None:
            assert set(self._tables) == set(open_sequences), "open sequences differ"
