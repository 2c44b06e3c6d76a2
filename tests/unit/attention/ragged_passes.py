"""Passes over a paged cache, and over contiguous ones beside it."""

from __future__ import annotations

import torch

from fathom.attention.backend import AttentionBackend, RaggedBatch
from fathom.attention.paged_cache import PagedKVCache
from fathom.attention.pool import KVPool
from tests.unit.reference_attention import ContiguousAttention

KV_HEADS = 2


def run_both(
    backend: AttentionBackend,
    passes: list[list[tuple[int, int]]],
    heads: int,
    dtype: torch.dtype,
    dim: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append rows pass by pass to both; returns the last pass's outputs.

    Args:
        passes: for each pass (sequence, rows) pairs.
    """
    torch.manual_seed(0)
    pool = KVPool(
        num_layers=1,
        num_kv_heads=KV_HEADS,
        head_dim=dim,
        num_blocks=400,
        block_size=4,
        dtype=dtype,
    )
    cache = PagedKVCache(400, 4, pool)
    oracle = ContiguousAttention(heads, KV_HEADS)
    lengths: dict[int, int] = {}
    paged = contiguous = torch.empty(0)
    for rows in passes:
        batch = []
        for seq_id, count in rows:
            if seq_id not in cache:
                cache.open(seq_id)
            start = lengths.get(seq_id, 0)
            lengths[seq_id] = start + count
            assert cache.grow(seq_id, start + count)
            batch.append(cache.rows(seq_id, start, count))
        total = sum(count for _, count in rows)
        q = torch.randn(total, heads, dim).to(dtype)
        kv = torch.randn(total, 2 * KV_HEADS, dim).to(dtype)
        ragged = RaggedBatch.build(batch, pool)
        paged = backend.plan(ragged, pool, heads)(0, q, kv)
        oracle.set_rows(
            [seq_id for seq_id, count in rows for _ in range(count)], ragged.positions.tolist()
        )
        contiguous = oracle(0, q, kv)
    return paged, contiguous
