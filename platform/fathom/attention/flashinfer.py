"""Attention over the paged cache by FlashInfer's kernels, on NVIDIA GPUs.

The kernels read the pool where it lies. Layout and calls follow FlashInfer 0.7's documentation
(``BatchPrefillWithPagedKVCacheWrapper``). Prefill and decode are one call: a decoding sequence is
one with a single query row. FlashInfer comes with the extra ``gpu`` and compiles its kernels at
first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from fathom.attention.backend import Attend, RaggedBatch, SequenceRows
from fathom.attention.fixed import RowTables
from fathom.attention.pool import KVPool

HEAD_DIMS = (64, 128, 256)
"""Head sizes that FlashInfer's FA2 kernels are made for."""

DTYPES = (torch.float16, torch.bfloat16)

_WORKSPACE_BYTES = 128 << 20  # what the documentation recommends


class PageLayout(NamedTuple):
    """Which pages sequences have, as FlashInfer takes it: int32 on the host.

    Attributes:
        row_starts: [sequences + 1] first row of each, and the number of rows behind.
        page_starts: [sequences + 1] likewise, into ``pages``.
        pages: [sum of pages] blocks of the pool.
        last_page_lengths: [sequences] tokens in each one's last page, from 1 to the block size.
    """

    row_starts: torch.Tensor
    page_starts: torch.Tensor
    pages: torch.Tensor
    last_page_lengths: torch.Tensor

    @classmethod
    def of(cls, sequences: Sequence[SequenceRows], block_size: int) -> PageLayout:
        """Lay out sequences; each one's last row is the last that its last page holds."""
        pages = [list(rows.blocks[: -(-rows.stop // block_size)]) for rows in sequences]
        return cls(
            _int32([0, *accumulate(rows.num_rows for rows in sequences)]),
            _int32([0, *accumulate(map(len, pages))]),
            _int32([block for own in pages for block in own]),
            _int32([(rows.stop - 1) % block_size + 1 for rows in sequences]),
        )

    @classmethod
    def of_rows(cls, tables: torch.Tensor, lengths: torch.Tensor, block_size: int) -> PageLayout:
        """Lay out rows that are sequences of their own.

        Args:
            tables: [rows, width] int32 blocks. lengths: [rows] int32 keys that each row sees.
        """
        counts = (lengths + block_size - 1) // block_size
        used = torch.arange(tables.shape[1]) < counts[:, None]
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = counts.cumsum(0)
        return cls(
            torch.arange(len(lengths) + 1, dtype=torch.int32),
            starts,
            tables[used],
            (lengths - 1) % block_size + 1,
        )


def pages_of(pool: KVPool, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer in FlashInfer's layout ``HND``, as views of the pool.

    Returns:
        two tensors of equal strides, [num_blocks, num_kv_heads, block_size, head_dim].
    """
    heads = pool.num_kv_heads
    whole = pool.data[layer].view(2 * heads, pool.num_blocks, pool.block_size, pool.head_dim)
    return whole[:heads].transpose(0, 1), whole[heads:].transpose(0, 1)


class FlashInferBackend:
    """See the module's docstring. For pools of half precision on a GPU."""

    name = "flashinfer"

    def __init__(self) -> None:
        self._wrapper: Any = None
        self._planned: object = None

    def plan(self, batch: RaggedBatch, pool: KVPool, num_heads: int) -> Attend:
        """Lay out pages; FlashInfer's own plan is made where the pass begins."""
        layout = PageLayout.of(batch.sequences, pool.block_size)

        def attend(layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            if self._wrapper is None:
                self._wrapper = _new_wrapper(pool.data.device)
            # One wrapper holds one plan: another pass may have made its own since.
            if self._planned is not layout:
                _plan(self._wrapper, layout, pool, num_heads)
                self._planned = layout
            pool.write(layer, batch.slots, kv)
            return self._wrapper.run(q, pages_of(pool, layer)).flatten(1)

        return attend

    def fixed(self, num_rows: int, width: int, pool: KVPool, num_heads: int) -> FlashInferFixedPass:
        """See ``FixedBackend``."""
        return FlashInferFixedPass(num_rows, width, pool, num_heads)


class FlashInferFixedPass:
    """A fixed pass by a wrapper of its own, made for CUDA graphs; see ``FixedPass``."""

    def __init__(self, num_rows: int, width: int, pool: KVPool, num_heads: int) -> None:
        device = pool.data.device
        self.num_rows = num_rows
        self._rows = RowTables(num_rows, width, pool)
        self.positions = self._rows.positions
        self._pool = pool
        self._num_heads = num_heads

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self._wrapper = _new_wrapper(
            device,
            use_cuda_graph=True,
            qo_indptr_buf=buffer(num_rows + 1),
            paged_kv_indptr_buf=buffer(num_rows + 1),
            paged_kv_indices_buf=buffer(num_rows * width),
            paged_kv_last_page_len_buf=buffer(num_rows),
        )

    def fill(self, sequences: Sequence[SequenceRows]) -> None:
        """See ``FixedPass``."""
        self._rows.fill(sequences)
        size = self._pool.block_size
        layout = PageLayout.of_rows(self._rows.tables, self._rows.lengths, size)
        _plan(self._wrapper, layout, self._pool, self._num_heads)

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See ``Attend``."""
        self._pool.write(layer, self._rows.slots, kv)
        out: torch.Tensor = self._wrapper.run(q, pages_of(self._pool, layer))
        return out.flatten(1)


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Shared by all wrappers of a device: they run one after the other."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _new_wrapper(device: torch.device, **graph: Any) -> Any:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    # Of FlashInfer's kernels, ``fa2`` run on every GPU from Ampere on, and read pages by stride.
    return BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "HND", backend="fa2", **graph)


def _plan(wrapper: Any, layout: PageLayout, pool: KVPool, num_heads: int) -> None:
    wrapper.plan(
        layout.row_starts,
        layout.page_starts,
        layout.pages.to(pool.data.device),
        layout.last_page_lengths,
        num_heads,
        pool.num_kv_heads,
        pool.head_dim,
        pool.block_size,
        causal=True,
        q_data_type=pool.data.dtype,
        kv_data_type=pool.data.dtype,
    )


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
