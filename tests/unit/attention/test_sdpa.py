"""The SDPA backend agrees with plain attention over contiguous caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.attention.sdpa import SdpaBackend
from tests.unit.attention.ragged_passes import KV_HEADS, run_both


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
    paged, contiguous = run_both(SdpaBackend(), passes, KV_HEADS * group, torch.float32)
    torch.testing.assert_close(paged, contiguous, rtol=1e-4, atol=1e-5)


def test_short_and_long_sequences_decode_in_one_batch():
    prompts = [(0, 500), (1, 3), (2, 40), (3, 130), (4, 500)]
    decode = [(seq, 1) for seq, _ in prompts]
    paged, contiguous = run_both(SdpaBackend(), [prompts, decode, decode], 6, torch.float32)
    torch.testing.assert_close(paged, contiguous, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_bfloat16_stays_within_its_rounding(rows):
    passes = [[(0, 30), (1, 17)], [(0, rows), (1, rows)]]
    paged, contiguous = run_both(SdpaBackend(), passes, 6, torch.bfloat16)
    torch.testing.assert_close(paged.float(), contiguous.float(), rtol=3e-2, atol=3e-2)
