"""The seam between a stage and the code that computes attention for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fathom.attention.pool import KVPool


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """A sequence's part of a ragged batch: rows at positions [start, start + num_rows).

    Attributes:
        blocks: of the pool, those of all positions up to the last.
    """

    blocks: Sequence[int]
    start: int
    num_rows: int

    @property
    def stop(self) -> int:
        """One past the last position; also the keys that the last row sees."""
        return self.start + self.num_rows


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Rows of many sequences, one sequence after the other, prefill and decode alike.

    Attributes:
        sequences: in row order. positions: [rows] int64. slots: [rows] int64, where each row's
            keys and values go in the pool.
    """

    sequences: Sequence[SequenceRows]
    positions: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def build(cls, sequences: Sequence[SequenceRows], pool: KVPool) -> RaggedBatch:
        """Lay out rows in a pool."""
        size = pool.block_size
        positions: list[int] = []
        slots: list[int] = []
        for rows in sequences:
            places = range(rows.start, rows.stop)
            positions += places
            slots += [rows.blocks[p // size] * size + p % size for p in places]
        device = pool.data.device
        return cls(
            sequences,
            torch.tensor(positions, dtype=torch.int64, device=device),
            torch.tensor(slots, dtype=torch.int64, device=device),
        )

    @property
    def num_rows(self) -> int:
        """Rows of all sequences together."""
        return len(self.positions)


class Attend(Protocol):
    """Attention of one pass: stores the rows' keys and values, then attends causally."""

    def __call__(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Attend in one layer.

        Args:
            layer: index within the stage.
            q: [rows, num_heads, head_dim], rotated.
            kv: [rows, 2 * num_kv_heads, head_dim], rotated keys first, then values.

        Returns:
            [rows, num_heads * head_dim].
        """
        ...


class AttentionBackend(Protocol):
    """Computes attention over a paged cache.

    ``plan`` runs once a pass, so that block tables and masks are laid out once for all layers.
    """

    def plan(self, batch: RaggedBatch, pool: KVPool, num_heads: int) -> Attend:
        """Prepare one pass over ``batch``."""
        ...
