"""Attention over the paged cache by our own CPU kernels: nothing is gathered, and there is no mask.

Few rows of a sequence, as in decoding and flushes of stacks, attend one by one. Many rows, as a
prompt has, attend in spans: tiles of keys against blocks of rows.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate

import torch

from fathom.attention.backend import AttentionBackend, RaggedBatch
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.kernels.compiled import Pass, library, optional_library

MOST_ROWS = 32
"""Sequences with more rows attend in spans."""

SPAN_ROWS = 256
"""Most rows of a span: what one thread takes at once, and lays keys and values out for."""

_DTYPES = (torch.float32, torch.bfloat16)


def backend_for(pool: KVPool) -> AttentionBackend:
    """The fastest backend that this machine has for a pool."""
    kernels = optional_library() if pool.data.device.type == "cpu" else None
    if kernels is None or pool.data.dtype not in _DTYPES:
        return SdpaBackend()
    return PagedBackend() if kernels.fathom_attends(pool.head_dim) else SdpaBackend()


class PagedBackend:
    """See the module's docstring. For pools on a CPU, of float32 or bfloat16."""

    def plan(self, batch: RaggedBatch, pool: KVPool, num_heads: int) -> PagedPass:
        """Lay out block tables and lengths, once for all layers."""
        rows: list[int] = []
        owners: list[int] = []
        lengths: list[int] = []
        spans: list[tuple[int, int, int, int]] = []
        firsts = accumulate((each.num_rows for each in batch.sequences), initial=0)
        for table, (each, first) in enumerate(zip(batch.sequences, firsts, strict=False)):
            if each.num_rows > MOST_ROWS:
                spans += [
                    (first + row, min(SPAN_ROWS, each.num_rows - row), each.start + row, table)
                    for row in range(0, each.num_rows, SPAN_ROWS)
                ]
                continue
            rows += range(first, first + each.num_rows)
            owners += [table] * each.num_rows
            lengths += range(each.start + 1, each.stop + 1)
        tables = [each.blocks[: -(-each.stop // pool.block_size)] for each in batch.sequences]
        width = max(map(len, tables))
        padded = [[*table, *[0] * (width - len(table))] for table in tables]
        arrays = [
            torch.tensor(values, dtype=torch.int32)
            for values in (padded, rows, owners, lengths, spans)
        ]
        own = Pass(
            *(array.data_ptr() for array in arrays),
            batch.slots.data_ptr(),
            len(rows),
            len(spans),
            batch.num_rows,
            width,
            pool.block_size,
            pool.num_kv_heads,
            num_heads,
            pool.head_dim,
            pool.data.dtype is torch.bfloat16,
        )
        return PagedPass(own, pool, (*arrays, batch.slots))


class PagedPass:
    """Attention of one pass; see ``Attend``.

    Attributes:
        address: of the pass as the kernels take it. pool: keys and values.
        scale: of the scores.
    """

    def __init__(self, own: Pass, pool: KVPool, kept: tuple[torch.Tensor, ...]) -> None:
        self._own = own
        self._kept = kept  # ``own`` points into them
        self._run = library().fathom_attend
        self.address = ctypes.addressof(own)
        self.pool = pool
        self.scale = pool.head_dim**-0.5

    def __call__(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See ``Attend``."""
        out = q.new_empty((len(q), q.shape[1] * q.shape[2]))
        self._run(
            self.address,
            self.pool.data[layer].data_ptr(),
            self.pool.data.shape[2],
            q.data_ptr(),
            q.stride(0),
            kv.data_ptr(),
            kv.stride(0),
            self.scale,
            out.data_ptr(),
            out.stride(0),
            torch.get_num_threads(),
        )
        return out
