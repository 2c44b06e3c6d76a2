"""Passes of a fixed number of rows, which read device buffers alone: what a captured graph replays.

Every row is laid out as a sequence of its own, with the blocks and the length that it sees: all
rows' keys and values are stored before any row looks back, so that rows of one sequence see one
another. The layout of a pass then depends on nothing but how many rows it has and how many blocks
a row may see, and flushes fit it as well as decoding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from fathom.attention.backend import SequenceRows
from fathom.attention.blocks import NULL_BLOCK
from fathom.attention.pool import KVPool

_LEAST_WIDTH = 8
"""Blocks that the smallest table has room for."""


class FixedPass(Protocol):
    """A pass of a fixed number of rows, whose buffers stay where they are.

    Attributes:
        num_rows: rows of the pass, padding included. positions: [num_rows] int64.
    """

    num_rows: int
    positions: torch.Tensor

    def fill(self, sequences: Sequence[SequenceRows]) -> None:
        """Lay out at most ``num_rows`` rows in the buffers; the rest is padding."""
        ...

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See ``Attend``. It reads nothing but the buffers, so that it can be captured."""
        ...


@runtime_checkable
class FixedBackend(Protocol):
    """An attention backend that has passes of a fixed number of rows."""

    def fixed(self, num_rows: int, width: int, pool: KVPool, num_heads: int) -> FixedPass:
        """A pass of ``num_rows`` rows that see up to ``width`` blocks each."""
        ...


def width_of(sequences: Sequence[SequenceRows], block_size: int) -> int:
    """Blocks that tables get for these rows: the next power of two, so that few widths occur."""
    longest = max(-(-rows.stop // block_size) for rows in sequences)
    return max(_LEAST_WIDTH, 1 << (longest - 1).bit_length())


class RowTables:
    """Host and device buffers of a fixed pass: where rows write and what they see.

    Padding is at position 0 of the null block: what it writes and sees there is its own. Once a
    pass is over the null block has to be emptied (``clear_null_block``).

    Attributes:
        positions, slots: [num_rows] int64 on the pool's device, as in ``RaggedBatch``.
        tables: [num_rows, width] int32 blocks on the host, the null block as padding.
        lengths: [num_rows] int32 on the host, keys that a row sees, itself included.
    """

    def __init__(self, num_rows: int, width: int, pool: KVPool) -> None:
        device = pool.data.device
        self.num_rows = num_rows
        self.width = width
        self.positions = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.slots = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.tables = torch.zeros(num_rows, width, dtype=torch.int32)
        self.lengths = torch.ones(num_rows, dtype=torch.int32)
        self._block_size = pool.block_size

    def fill(self, sequences: Sequence[SequenceRows]) -> None:
        """Lay out rows.

        Raises:
            ValueError: for more rows, or longer tables, than the buffers hold.
        """
        size = self._block_size
        count = sum(rows.num_rows for rows in sequences)
        if count > self.num_rows or width_of(sequences, size) > self.width:
            raise ValueError(
                f"{count} rows over {width_of(sequences, size)} blocks do not fit a pass of "
                f"{self.num_rows} rows over {self.width}"
            )
        positions = [0] * self.num_rows
        slots = [NULL_BLOCK * size] * self.num_rows
        lengths = [1] * self.num_rows
        self.tables.fill_(NULL_BLOCK)
        row = 0
        for rows in sequences:
            blocks = list(rows.blocks[: -(-rows.stop // size)])
            table = torch.tensor(blocks, dtype=torch.int32)
            self.tables[row : row + rows.num_rows, : len(blocks)] = table
            for position in range(rows.start, rows.stop):
                positions[row] = position
                slots[row] = blocks[position // size] * size + position % size
                lengths[row] = position + 1
                row += 1
        self.positions.copy_(torch.tensor(positions, dtype=torch.int64))
        self.slots.copy_(torch.tensor(slots, dtype=torch.int64))
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))


def clear_null_block(pool: KVPool) -> None:
    """Undo what padding wrote: the null block is one of zeros."""
    pool.zero_block(NULL_BLOCK)


class SdpaFixedPass:
    """A fixed pass by torch's SDPA over gathered keys and values; see ``FixedPass``.

    It gathers ``width`` blocks for every row, however few of them the row sees.
    """

    def __init__(self, num_rows: int, width: int, pool: KVPool, num_heads: int) -> None:
        device, keys = pool.data.device, width * pool.block_size
        self.num_rows = num_rows
        self._rows = RowTables(num_rows, width, pool)
        self.positions = self._rows.positions
        self._blocks = torch.zeros(num_rows * width, dtype=torch.int64, device=device)
        self._mask = torch.zeros(num_rows, 1, 1, keys, dtype=pool.data.dtype, device=device)
        self._places = torch.arange(keys, device=device)
        self._pool = pool
        self._heads_per_kv = num_heads // pool.num_kv_heads

    def fill(self, sequences: Sequence[SequenceRows]) -> None:
        """See ``FixedPass``."""
        self._rows.fill(sequences)
        self._blocks.copy_(self._rows.tables.flatten())
        lengths = self._rows.lengths.to(self._places.device)
        hidden = self._places >= lengths[:, None]
        self._mask.zero_().masked_fill_(hidden[:, None, None], float("-inf"))

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See ``Attend``."""
        pool, rows, heads = self._pool, self.num_rows, self._pool.num_kv_heads
        pool.write(layer, self._rows.slots, kv)
        by_block = pool.data[layer].view(2 * heads, -1, pool.block_size * pool.head_dim)
        gathered = by_block.index_select(1, self._blocks)
        gathered = gathered.view(2 * heads, rows, -1, pool.head_dim)
        keys, values = gathered[:heads].transpose(0, 1), gathered[heads:].transpose(0, 1)
        # Query heads of one KV head are laid out as its query rows, as in ``SdpaBackend``.
        queries = q.reshape(rows, heads, self._heads_per_kv, pool.head_dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask)
        return out.reshape(rows, -1)
