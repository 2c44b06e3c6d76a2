"""Attention over the paged cache by our own CPU kernel, where each sequence has few rows.

Decoding and flushes of stacks read keys and values where they lie. Many rows of one sequence, as a
prompt has, go through ``SdpaBackend``, whose matrix products are faster there.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate

import torch

from fathom.attention.backend import Attend, AttentionBackend, RaggedBatch
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.kernels.compiled import Pass, optional_library

MOST_ROWS = 32
"""Sequences with more rows go to SDPA."""

_DTYPES = (torch.float32, torch.bfloat16)


def backend_for(pool: KVPool) -> AttentionBackend:
    """The fastest backend that this machine has for a pool."""
    kernels = optional_library() if pool.data.device.type == "cpu" else None
    if kernels is None or pool.data.dtype not in _DTYPES:
        return SdpaBackend()
    return PagedBackend() if kernels.fathom_attends(pool.head_dim) else SdpaBackend()


class PagedBackend:
    """See the module's docstring. For pools on a CPU, of float32 or bfloat16."""

    def __init__(self) -> None:
        kernels = optional_library()
        assert kernels is not None
        self._run = kernels.fathom_attend
        self._sdpa = SdpaBackend()

    def plan(self, batch: RaggedBatch, pool: KVPool, num_heads: int) -> Attend:
        """Lay out block tables and lengths, once for all layers."""
        few = [rows.num_rows <= MOST_ROWS for rows in batch.sequences]
        if not any(few):
            return self._sdpa.plan(batch, pool, num_heads)
        many = [not each for each in few]
        rest = None if all(few) else self._sdpa.plan_some(batch, pool, num_heads, many)
        tables: list[list[int]] = []
        rows: list[int] = []
        owners: list[int] = []
        lengths: list[int] = []
        firsts = accumulate((each.num_rows for each in batch.sequences), initial=0)
        for own, is_few, first in zip(batch.sequences, few, firsts, strict=False):
            if not is_few:
                continue
            rows += range(first, first + own.num_rows)
            owners += [len(tables)] * own.num_rows
            lengths += range(own.start + 1, own.stop + 1)
            tables.append(list(own.blocks[: -(-own.stop // pool.block_size)]))
        width = max(map(len, tables))
        arrays = [
            torch.tensor(values, dtype=torch.int32)
            for values in ([t + [0] * (width - len(t)) for t in tables], rows, owners, lengths)
        ]
        own_pass = Pass(
            *(array.data_ptr() for array in arrays),
            batch.slots.data_ptr(),
            len(rows),
            batch.num_rows,
            width,
            pool.block_size,
            pool.num_kv_heads,
            num_heads,
            pool.head_dim,
            pool.data.dtype is torch.bfloat16,
        )
        address, scale, run = ctypes.addressof(own_pass), pool.head_dim**-0.5, self._run
        slots, threads = pool.data.shape[2], torch.get_num_threads()

        def attend(
            layer: int, q: torch.Tensor, kv: torch.Tensor, keep: object = (own_pass, arrays, batch)
        ) -> torch.Tensor:
            out = q.new_empty((len(q), q.shape[1] * q.shape[2]))
            run(
                address,
                pool.data[layer].data_ptr(),
                slots,
                q.data_ptr(),
                q.stride(0),
                kv.data_ptr(),
                kv.stride(0),
                scale,
                out.data_ptr(),
                out.stride(0),
                threads,
            )
            if rest is not None:
                rest(layer, q, out.view(q.shape))
            return out

        return attend
