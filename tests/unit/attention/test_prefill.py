"""Many rows a sequence in the tiled kernel: as SDPA, and the same however a prompt is cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.attention.backend import AttentionBackend, RaggedBatch, SequenceRows
from fathom.attention.paged import MOST_ROWS, PagedBackend
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.kernels.compiled import optional_library

pytestmark = pytest.mark.skipif(optional_library() is None, reason="needs a C++ compiler")

KV_HEADS = 2
TILE = 512  # kTile of prefill.cpp
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def new_pool(
    positions: int, block_size: int = 16, dim: int = 32, dtype: torch.dtype = torch.float32
) -> KVPool:
    pool = KVPool(
        num_layers=1,
        num_kv_heads=KV_HEADS,
        head_dim=dim,
        num_blocks=-(-positions // block_size) + 1,
        block_size=block_size,
        dtype=dtype,
    )
    pool.data.normal_(generator=torch.Generator().manual_seed(0))
    return pool


def rows_of(pool: KVPool, parts: list[tuple[int, int]]) -> list[SequenceRows]:
    """Sequences of (start, rows) in blocks that lie in no order."""
    free = (torch.randperm(pool.num_blocks - 1) + 1).tolist()
    found = []
    for start, count in parts:
        needed = -(-(start + count) // pool.block_size)
        found.append(SequenceRows([free.pop() for _ in range(needed)], start, count))
    return found


def run(
    backend: AttentionBackend,
    pool: KVPool,
    sequences: list[SequenceRows],
    q: torch.Tensor,
    kv: torch.Tensor,
) -> torch.Tensor:
    batch = RaggedBatch.build(sequences, pool)
    return backend.plan(batch, pool, q.shape[1])(0, q, kv)


def inputs(rows: int, heads: int, pool: KVPool) -> tuple[torch.Tensor, torch.Tensor]:
    """Strided views of one buffer, as a decoder gives them."""
    wide = torch.randn(rows, heads + 2 * KV_HEADS, pool.head_dim).to(pool.data.dtype)
    return wide[:, :heads], wide[:, heads:]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 2 * TILE + 40), st.integers(1, TILE + 100)),
        min_size=1,
        max_size=3,
    ),
    block_size=st.sampled_from([1, 4, 16, 24]),
    group=st.sampled_from([1, 3, 4, 7]),
    dim=st.sampled_from([16, 32, 64, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_ragged_batches_agree_with_sdpa(parts, block_size, group, dim, dtype):
    torch.manual_seed(1)
    positions = sum(start + count + block_size for start, count in parts)
    pools = [new_pool(positions, block_size, dim, dtype) for _ in range(2)]
    sequences = rows_of(pools[0], parts)
    q, kv = inputs(sum(count for _, count in parts), KV_HEADS * group, pools[0])
    own = run(PagedBackend(), pools[0], sequences, q, kv)
    expected = run(SdpaBackend(), pools[1], sequences, q, kv)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(own.float(), expected.float(), rtol=tolerance, atol=tolerance)
    assert torch.equal(pools[0].data, pools[1].data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [128, 256])
def test_large_heads_agree_with_sdpa(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    pools = [new_pool(400, dim=dim, dtype=dtype) for _ in range(2)]
    sequences = rows_of(pools[0], [(70, 90), (0, 200)])
    q, kv = inputs(290, 2 * KV_HEADS, pools[0])
    own = run(PagedBackend(), pools[0], sequences, q, kv)
    expected = run(SdpaBackend(), pools[1], sequences, q, kv)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(own.float(), expected.float(), rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(MOST_ROWS + 1, 400), min_size=1, max_size=4),
    count=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_its_chunk_or_on_its_neighbours(cuts, count, dtype):
    torch.manual_seed(2)
    total = sum(cuts)
    whole_pool, pool = (new_pool(2 * total + 80, dtype=dtype) for _ in range(2))
    one, other = rows_of(whole_pool, [(0, total), (0, total)])
    q, kv = inputs(2 * total, 3 * KV_HEADS, pool)
    whole = run(PagedBackend(), whole_pool, [one, other], q, kv)[total:]
    q, kv, parts, first = q[total:], kv[total:], [], 0
    with threads(count):
        for rows in cuts:
            part = slice(first, first + rows)
            sequences = [SequenceRows(other.blocks, first, rows)]
            parts.append(run(PagedBackend(), pool, sequences, q[part], kv[part]))
            first += rows
    assert torch.equal(whole, torch.cat(parts))


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    torch.manual_seed(3)
    pools = [new_pool(700) for _ in range(2)]
    sequences = rows_of(pools[0], [(0, 650)])
    q, kv = inputs(650, 2 * KV_HEADS, pools[0])
    q *= 1000
    kv[:, :KV_HEADS] *= torch.linspace(0.1, 50, 650)[:, None, None]  # the maximum keeps moving
    own = run(PagedBackend(), pools[0], sequences, q, kv)
    expected = run(SdpaBackend(), pools[1], sequences, q, kv)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_with_its_sequence(dtype: torch.dtype) -> None:
    pool = new_pool(300, dtype=dtype)
    pool.data.fill_(float("nan"))  # of sequences that were there before
    sequences = rows_of(pool, [(0, 70), (0, 75)])
    q, kv = inputs(145, 2 * KV_HEADS, pool)
    kv[3, 0] = float("nan")
    out = run(PagedBackend(), pool, sequences, q, kv)
    first_head = slice(0, 2 * pool.head_dim)
    assert out[3:70, first_head].isnan().all() and out[70:].isfinite().all()
