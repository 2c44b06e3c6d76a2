"""The paged CPU kernel agrees with plain attention over contiguous caches, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.attention.backend import RaggedBatch, SequenceRows
from fathom.attention.paged import MOST_ROWS, PagedBackend, backend_for
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.kernels.compiled import optional_library
from tests.unit.attention.ragged_passes import KV_HEADS, run_both

pytestmark = pytest.mark.skipif(optional_library() is None, reason="needs a C++ compiler")


@settings(max_examples=40, deadline=None)
@given(
    passes=st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(1, MOST_ROWS + 8)),
            min_size=1,
            max_size=6,
            unique_by=lambda pair: pair[0],
        ),
        min_size=1,
        max_size=4,
    ),
    group=st.sampled_from([1, 3, 4, 7]),
    dim=st.sampled_from([16, 32]),
)
def test_ragged_batches_agree_with_contiguous_attention(passes, group, dim):
    heads = KV_HEADS * group
    paged, contiguous = run_both(PagedBackend(), passes, heads, torch.float32, dim)
    torch.testing.assert_close(paged, contiguous, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_every_head_size_in_bfloat16(dim):
    paged, contiguous = run_both(
        PagedBackend(), [[(0, 30), (1, 3)], [(0, 1), (1, 4)]], 6, torch.bfloat16, dim
    )
    torch.testing.assert_close(paged.float(), contiguous.float(), rtol=2e-2, atol=2e-2)


def new_pool(dim: int, dtype: torch.dtype = torch.float32) -> KVPool:
    pool = KVPool(
        num_layers=1, num_kv_heads=2, head_dim=dim, num_blocks=40, block_size=4, dtype=dtype
    )
    pool.data.normal_(generator=torch.Generator().manual_seed(0))
    return pool


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_the_rows_beside_them(threads):
    sequences = [SequenceRows(range(1 + 10 * i, 11 + 10 * i), 30 + i, 1 + i) for i in range(3)]
    torch.manual_seed(1)
    q, kv = torch.randn(6, 6, 16).bfloat16(), torch.randn(6, 4, 16).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pool = new_pool(16, torch.bfloat16)
        together = PagedBackend().plan(RaggedBatch.build(sequences, pool), pool, 6)(0, q, kv)
        alone, first = [], 0
        for rows in sequences:
            pool = new_pool(16, torch.bfloat16)
            attend = PagedBackend().plan(RaggedBatch.build([rows], pool), pool, 6)
            part = slice(first, first + rows.num_rows)
            alone.append(attend(0, q[part], kv[part]))
            first += rows.num_rows
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat(alone))


def test_what_is_not_finite_stays_with_its_sequence():
    pool = new_pool(16)
    sequences = [SequenceRows([1], 0, 2), SequenceRows([2], 0, 2)]
    q, kv = torch.ones(4, 2, 16), torch.ones(4, 4, 16)
    kv[0] = float("nan")
    out = PagedBackend().plan(RaggedBatch.build(sequences, pool), pool, 2)(0, q, kv)
    assert out[:2].isnan().all() and out[2:].isfinite().all()


def test_pools_that_the_kernel_cannot_read_go_to_sdpa():
    assert isinstance(backend_for(new_pool(64)), PagedBackend)
    assert isinstance(backend_for(new_pool(20)), SdpaBackend)
    assert isinstance(backend_for(new_pool(64, torch.float16)), SdpaBackend)
