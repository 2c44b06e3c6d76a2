"""The SDPA backend agrees with plain attention over contiguous caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.attention.backend import RaggedBatch
from fathom.attention.paged_cache import PagedKVCache
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from tests.unit.reference_attention import ContiguousAttention

KV_HEADS, DIM = 2, 8


def run_both(
    passes: list[list[tuple[int, int]]], heads: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append rows pass by pass to both; returns the last pass's outputs.

    Args:
        passes: for each pass (sequence, rows) pairs.
    """
    torch.manual_seed(0)
    pool = KVPool(
        num_layers=1,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
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
        q = torch.randn(total, heads, DIM).to(dtype)
        kv = torch.randn(total, 2 * KV_HEADS, DIM).to(dtype)
        ragged = RaggedBatch.build(batch, pool)
        paged = SdpaBackend().plan(ragged, pool, heads)(0, q, kv)
        oracle.set_rows(
            [seq_id for seq_id, count in rows for _ in range(count)], ragged.positions.tolist()
        )
        contiguous = oracle(0, q, kv)
    return paged, contiguous


@settings(max_examples=40, deadline=None)
@given(
    passes=st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(1, 40)),
            min_size=1,
            max_size=6,
            unique_by=lambda pair: pair[0],
        ),
        min_size=1,
        max_size=4,
    ),
    group=st.sampled_from([1, 3]),
)
def test_ragged_batches_agree_with_contiguous_attention(passes, group):
    paged, contiguous = run_both(passes, KV_HEADS * group, torch.float32)
    torch.testing.assert_close(paged, contiguous, rtol=1e-4, atol=1e-5)


def test_short_and_long_sequences_decode_in_one_batch():
    prompts = [(0, 500), (1, 3), (2, 40), (3, 130), (4, 500)]
    decode = [(seq, 1) for seq, _ in prompts]
    paged, contiguous = run_both([prompts, decode, decode], 6, torch.float32)
    torch.testing.assert_close(paged, contiguous, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_bfloat16_stays_within_its_rounding(rows):
    passes = [[(0, 30), (1, 17)], [(0, rows), (1, rows)]]
    paged, contiguous = run_both(passes, 6, torch.bfloat16)
    torch.testing.assert_close(paged.float(), contiguous.float(), rtol=3e-2, atol=3e-2)
