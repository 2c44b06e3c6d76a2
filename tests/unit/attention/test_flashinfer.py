"""What FlashInfer is told, read as its documentation says, is what SDPA computes.

FlashInfer itself needs a GPU (``tests/gpu``); ``attend_pages`` does here what the documentation of
``BatchPrefillWithPagedKVCacheWrapper`` promises of ``plan`` and ``run``.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.attention.backend import RaggedBatch, SequenceRows
from fathom.attention.fixed import RowTables, width_of
from fathom.attention.flashinfer import PageLayout, pages_of
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend

HEADS, KV_HEADS, DIM, SIZE = 6, 2, 16, 4


def attend_pages(
    layout: PageLayout, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Causal attention, aligned at the end, over pages [pages, kv heads, page size, dim]."""
    out = torch.empty_like(q)
    for index, last in enumerate(layout.last_page_lengths.tolist()):
        pages = layout.pages[layout.page_starts[index] : layout.page_starts[index + 1]].long()
        length = SIZE * (len(pages) - 1) + last
        keys, values = (
            cache[pages].transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(3, dim=1)
            for cache in caches
        )
        rows = slice(int(layout.row_starts[index]), int(layout.row_starts[index + 1]))
        count = rows.stop - rows.start
        scores = torch.einsum("rhd,khd->hrk", q[rows], keys) * DIM**-0.5
        seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hrk,khd->rhd", weights, values)
    return out.flatten(1)


def a_pool() -> KVPool:
    pool = KVPool(
        num_layers=2,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        num_blocks=50,
        block_size=SIZE,
        dtype=torch.float32,
    )
    pool.data[:, :, SIZE:].normal_(generator=torch.Generator().manual_seed(0))
    return pool


@st.composite
def ragged(draw: st.DrawFn) -> list[SequenceRows]:
    """Rows of up to 6 sequences in blocks of their own, in any order."""
    free = draw(st.permutations(range(1, 50)))
    rows: list[SequenceRows] = []
    for start, count in draw(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6)
    ):
        blocks, free = free[: -(-(start + count) // SIZE)], free[-(-(start + count) // SIZE) :]
        rows.append(SequenceRows(blocks, start, count))
    return rows


def in_pool(sequences: list[SequenceRows]) -> tuple[KVPool, torch.Tensor, torch.Tensor]:
    """A pool after a pass by SDPA, the pass's queries, and what SDPA gave."""
    pool = a_pool()
    batch = RaggedBatch.build(sequences, pool)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch.num_rows, HEADS, DIM, generator=generator)
    kv = torch.randn(batch.num_rows, 2 * KV_HEADS, DIM, generator=generator)
    return pool, q, SdpaBackend().plan(batch, pool, HEADS)(1, q, kv)


@settings(max_examples=40)
@given(ragged())
def test_a_ragged_pass(sequences):
    pool, q, expected = in_pool(sequences)
    found = attend_pages(PageLayout.of(sequences, SIZE), q, pages_of(pool, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(ragged(), st.integers(0, 3))
def test_a_pass_of_single_rows_with_padding(sequences, padding):
    pool, q, expected = in_pool(sequences)
    rows = RowTables(len(q) + padding, width_of(sequences, SIZE), pool)
    rows.fill(sequences)
    layout = PageLayout.of_rows(rows.tables, rows.lengths, SIZE)
    filled = torch.cat([q, torch.zeros(padding, HEADS, DIM)])
    found = attend_pages(layout, filled, pages_of(pool, 1))[: len(q)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_everything_on_the_host_is_int32_and_pages_are_views_of_equal_strides():
    pool = a_pool()
    layout = PageLayout.of([SequenceRows([3, 4], 5, 2), SequenceRows([1], 0, 4)], SIZE)
    assert {part.dtype for part in layout} == {torch.int32}
    assert layout.row_starts.tolist() == [0, 2, 6]
    assert layout.page_starts.tolist() == [0, 2, 3]
    assert layout.pages.tolist() == [3, 4, 1]
    assert layout.last_page_lengths.tolist() == [3, 4]
    rows = RowTables(3, 8, pool)
    rows.fill([SequenceRows([3, 4], 5, 2)])
    assert {part.dtype for part in PageLayout.of_rows(rows.tables, rows.lengths, SIZE)} == {
        torch.int32
    }
    keys, values = pages_of(pool, 1)
    assert keys.shape == values.shape == (50, KV_HEADS, SIZE, DIM)
    assert keys.stride() == values.stride() and keys.stride(-1) == 1
    assert keys.data_ptr() == pool.data[1].data_ptr()
    assert torch.equal(values[7, 1], pool.data[1, KV_HEADS + 1, 7 * SIZE : 8 * SIZE])
