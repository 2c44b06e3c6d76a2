"""Where keys and values lie: blocks of slots, without a word on whose they are."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class BlockStorage(Protocol):
    """What block accounting asks of the place where the blocks lie, in this process or another."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block over another."""
        ...

    def zero_block(self, block: int) -> None:
        """Fill a block with zeros."""
        ...


class KVPool:
    """Keys and values of a stage's layers.

    Args:
        num_layers: layers of the stage. num_kv_heads, head_dim: of one layer.
        num_blocks: blocks of the pool, one of which is the null block of zeros.
        block_size: tokens a block.
        dtype, device: of the pool. Memory: see ``block_bytes``.

    Attributes:
        data: [num_layers, 2 * num_kv_heads, num_blocks * block_size, head_dim]; heads
            [0, num_kv_heads) are keys, the rest values. Head-major, so that a gathered head is
            contiguous for SDPA.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        shape = (num_layers, 2 * num_kv_heads, num_blocks * block_size, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def block_bytes(
        num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block over all layers of a stage."""
        return num_layers * 2 * num_kv_heads * head_dim * block_size * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Store keys and values of rows.

        Args:
            layer: index within the stage.
            slots: [rows] int64. kv: [rows, 2 * num_kv_heads, head_dim], keys first.
        """
        self.data[layer].index_copy_(1, slots, kv.transpose(0, 1))

    @property
    def bytes_a_block(self) -> int:
        """Bytes of one block over all layers."""
        return self._slots_of(0).numel() * self.data.element_size()

    def read_block(self, block: int) -> NDArray[np.uint8]:
        """A copy of a block: [bytes_a_block] uint8, in the order of ``data``'s axes."""
        content = self._slots_of(block).contiguous().cpu()
        return content.view(torch.uint8).numpy().reshape(-1)

    def write_block(self, block: int, content: NDArray[np.uint8]) -> None:
        """Fill a block with what ``read_block`` gave.

        Raises:
            ValueError: for content of another size.
        """
        target = self._slots_of(block)
        if len(content) != self.bytes_a_block:
            raise ValueError(f"a block has {self.bytes_a_block} bytes, got {len(content)}")
        values = torch.from_numpy(content.copy()).view(self.data.dtype)  # it may be read-only
        target.copy_(values.view(target.shape))

    def copy_block(self, source: int, target: int) -> None:
        """See ``BlockStorage``."""
        self._slots_of(target).copy_(self._slots_of(source))

    def zero_block(self, block: int) -> None:
        """See ``BlockStorage``."""
        self._slots_of(block).zero_()

    def _slots_of(self, block: int) -> torch.Tensor:
        start = block * self.block_size
        return self.data[:, :, start : start + self.block_size]
