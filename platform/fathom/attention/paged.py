"""Attention over the paged cache by our own CPU kernel, where each sequence has few rows.

Decoding and flushes of stacks read keys and values where they lie. Many rows of one sequence, as a
prompt has, go through ``SdpaBackend``, whose matrix products are faster there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import accumulate

import torch

from fathom.attention.backend import Attend, AttentionBackend, RaggedBatch
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.kernels.compiled import Pass, library, optional_library

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
        for each, is_few, first in zip(batch.sequences, few, firsts, strict=False):
            if not is_few:
                continue
            rows += range(first, first + each.num_rows)
            owners += [len(tables)] * each.num_rows
            lengths += range(each.start + 1, each.stop + 1)
            tables.append(list(each.blocks[: -(-each.stop // pool.block_size)]))
        width = max(map(len, tables))
        arrays = [
            torch.tensor(values, dtype=torch.int32)
            for values in ([t + [0] * (width - len(t)) for t in tables], rows, owners, lengths)
        ]
        own = Pass(
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
        return PagedPass(own, pool, (*arrays, batch.slots), rest)


class PagedPass:
    """Attention of one pass; see ``Attend``.

    Attributes:
        address: of the pass as the kernels take it. pool: keys and values.
        is_whole: whether the kernel serves all rows, so that layers can be run by
            ``fathom_layers``.
        scale: of the scores.
    """

    def __init__(
        self,
        own: Pass,
        pool: KVPool,
        kept: tuple[torch.Tensor, ...],
        rest: Callable[[int, torch.Tensor, torch.Tensor], None] | None,
    ) -> None:
        self._own = own
        self._kept = kept  # ``own`` points into them
        self._rest = rest
        self._run = library().fathom_attend
        self.address = ctypes.addressof(own)
        self.pool = pool
        self.is_whole = rest is None
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
        if self._rest is not None:
            self._rest(layer, q, out.view(q.shape))
        return out
