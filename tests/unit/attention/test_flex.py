"""The backend by torch's flex_attention agrees with plain attention over contiguous caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.attention.flex import FlexBackend, _tiles
from tests.unit.attention.ragged_passes import KV_HEADS, run_both

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@settings(max_examples=15)
@given(
    passes=st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(1, 40)),
            min_size=1,
            max_size=5,
            unique_by=lambda pair: pair[0],
        ),
        min_size=1,
        max_size=3,
    ),
    group=st.sampled_from([1, 3]),
)
def test_ragged_batches_agree_with_contiguous_attention(passes, group):
    paged, contiguous = run_both(FlexBackend(), passes, KV_HEADS * group, torch.float32)
    torch.testing.assert_close(paged, contiguous, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_within_its_rounding(dtype):
    passes = [[(0, 30), (1, 17)], [(0, 1), (1, 150)], [(1, 1), (0, 4)]]
    paged, contiguous = run_both(FlexBackend(), passes, 6, dtype)
    torch.testing.assert_close(paged.float(), contiguous.float(), rtol=3e-2, atol=3e-2)


def test_tiles_are_those_that_hold_a_sequences_blocks():
    # Blocks of 48 slots: block 2 is slots 96 to 143, in tiles 0 and 1; 9 and 8 are both in tile 3.
    counts, tiles = _tiles([[2], [9, 0, 8]], 48, 5)
    assert counts.tolist() == [2, 2]
    assert tiles.tolist() == [[0, 1, 0, 0, 0], [0, 3, 0, 0, 0]]
