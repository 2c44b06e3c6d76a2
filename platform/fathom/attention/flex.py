"""Attention over the paged cache by torch's own ``flex_attention``, on every device.

Queries are padded to [sequences, heads, rows, head_dim]; keys and values are the pool itself, one
batch entry that all sequences share. Which of its slots a row sees is said by a mask over physical
slots; the compiled kernel runs through the tiles of 128 slots that hold blocks of a sequence, and
so reads more than it needs where a sequence's blocks lie apart. On a GPU ``flex_attention`` is
compiled at first use. On a CPU it runs as plain torch code over all slots of the pool: for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fathom.attention.backend import Attend, RaggedBatch
from fathom.attention.pool import KVPool

_TILE = 128
"""Query rows, and slots of the pool, of one tile of the block mask: torch's default."""


class FlexBackend:
    """See the module's docstring."""

    name = "flex"

    def __init__(self, *, compiled: bool | None = None) -> None:
        """Make one.

        Args:
            compiled: whether the kernel is compiled; None: on a GPU.
        """
        self._compiled = compiled

    def plan(self, batch: RaggedBatch, pool: KVPool, num_heads: int) -> Attend:
        """Prepare one pass: the mask, and where rows go in the padded queries."""
        count, rows = len(batch.sequences), max(each.num_rows for each in batch.sequences)
        mask = _block_mask(batch, pool, rows)
        compiled = pool.data.is_cuda if self._compiled is None else self._compiled
        run: Any = _compiled() if compiled else flex_attention
        grouped = num_heads != pool.num_kv_heads
        places = torch.tensor(
            [i * rows + r for i, each in enumerate(batch.sequences) for r in range(each.num_rows)],
            device=pool.data.device,
        )

        def attend(layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            pool.write(layer, batch.slots, kv)
            padded = q.new_zeros(count * rows, num_heads, pool.head_dim)
            padded[places] = q
            queries = padded.view(count, rows, num_heads, pool.head_dim).transpose(1, 2)
            keys, values = pool.data[layer, None].chunk(2, dim=1)
            out = run(queries, keys, values, block_mask=mask, enable_gqa=grouped)
            return out.transpose(1, 2).flatten(0, 1)[places].flatten(1)

        return attend


def _block_mask(batch: RaggedBatch, pool: KVPool, rows: int) -> BlockMask:
    """Which slots of the pool each padded query row sees, and in which tiles they lie."""
    device, size = pool.data.device, pool.block_size
    num_slots = pool.num_blocks * size
    tables = [list(each.blocks[: -(-each.stop // size)]) for each in batch.sequences]
    # [sequences, blocks of the pool]: the position of a block's first slot in a sequence, or one
    # past everything where it is not the sequence's.
    shape = (len(tables), pool.num_blocks)
    unseen = max(map(len, tables)) * size
    first_positions = torch.full(shape, unseen, dtype=torch.int32, device=device)
    owners = [index for index, table in enumerate(tables) for _ in table]
    ordinals = [size * index for table in tables for index in range(len(table))]
    first_positions[
        torch.tensor(owners, device=device),
        torch.tensor([block for table in tables for block in table], device=device),
    ] = torch.tensor(ordinals, dtype=torch.int32, device=device)
    # Rows of padding are like their sequence's last: no softmax is empty.
    starts = torch.tensor([each.start for each in batch.sequences], device=device)
    lasts = torch.tensor([each.stop - 1 for each in batch.sequences], device=device)

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        position = torch.minimum(starts[b] + q, lasts[b])
        return first_positions[b, k // size] + k % size <= position

    counts, tiles = _tiles(tables, size, -(-num_slots // _TILE))
    query_tiles = -(-rows // _TILE)
    return BlockMask.from_kv_blocks(
        counts.to(device)[:, None, None].repeat(1, 1, query_tiles),
        tiles.to(device)[:, None, None].repeat(1, 1, query_tiles, 1),
        BLOCK_SIZE=_TILE,
        mask_mod=sees,
        seq_lengths=(rows, num_slots),
        compute_q_blocks=False,
    )


def _tiles(
    tables: list[list[int]], block_size: int, num_tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of the pool that hold a sequence's blocks.

    Returns:
        how many, int32 [sequences], and which, int32 [sequences, num_tiles], zeros behind.
    """
    found = [
        sorted(
            {
                tile
                for block in table
                for tile in range(
                    block * block_size // _TILE, ((block + 1) * block_size - 1) // _TILE + 1
                )
            }
        )
        for table in tables
    ]
    filled = [own + [0] * (num_tiles - len(own)) for own in found]
    counts = torch.tensor([len(own) for own in found], dtype=torch.int32)
    return counts, torch.tensor(filled, dtype=torch.int32)


@cache
def _compiled() -> Callable[..., Any]:
    # Row counts and context lengths change from pass to pass: they must not be compiled in.
    return torch.compile(flex_attention, dynamic=True)
