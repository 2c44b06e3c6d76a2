"""Where a backend keeps the numbers of a block is found out, and what is stored comes back."""

from __future__ import annotations

import pytest
import torch

from fathom.vllm.kv_layout import Packing, from_blocks, to_blocks, write_plain

SIZE, WIDTH, HEADS = 32, 16, 2


def write_transposed(cache, keys, values, slots) -> None:
    """As vLLM's CPU kernels without tiles: keys by dimension, then values by token."""
    blocks, heads, size, width = cache.shape
    flat = cache.view(blocks, heads, 2, size * width // 2)
    by_dimension = flat[:, :, 0].view(blocks, heads, width // 2, size)
    by_token = flat[:, :, 1].view(blocks, heads, size, width // 2)
    by_dimension[slots // size, :, :, slots % size] = keys
    by_token[slots // size, :, slots % size] = values


def write_pairs(cache, keys, values, slots) -> None:
    """As kernels with tiles: values of two tokens interleaved."""
    blocks, heads, size, width = cache.shape
    flat = cache.view(blocks, heads, 2, size * width // 2)
    flat[:, :, 0].view(blocks, heads, size, width // 2)[slots // size, :, slots % size] = keys
    pairs = flat[:, :, 1].view(blocks, heads, size // 2, width // 2, 2)
    pairs[slots // size, :, slots % size // 2, :, slots % 2] = values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("write", [write_transposed, write_pairs, write_plain])
def test_what_was_written_is_read(write, dtype: torch.dtype) -> None:
    packing = Packing() if write is write_plain else Packing.probe(write, SIZE, WIDTH, dtype)
    cache = torch.zeros(5, HEADS, SIZE, 2 * WIDTH, dtype=dtype)
    tokens, table = 50, torch.tensor([3, 1])
    keys, values = torch.randn(2, tokens, HEADS, WIDTH).to(dtype)
    positions = torch.arange(tokens)
    write(cache, keys, values, table[positions // SIZE] * SIZE + positions % SIZE)
    found = packing.read(cache[table])[:, :tokens]
    assert torch.equal(found[:HEADS], keys.transpose(0, 1))
    assert torch.equal(found[HEADS:], values.transpose(0, 1))


def test_a_probe_of_plain_order_agrees_with_none() -> None:
    cache = torch.randn(3, HEADS, SIZE, 2 * WIDTH)
    probed = Packing.probe(write_plain, SIZE, WIDTH, torch.float32)
    assert torch.equal(probed.read(cache), Packing().read(cache))


def test_a_backend_that_changes_numbers_is_refused() -> None:
    def halves(cache, keys, values, slots) -> None:
        write_plain(cache, keys / 2, values, slots)

    with pytest.raises(ValueError, match="does not keep"):
        Packing.probe(halves, SIZE, WIDTH, torch.float32)


def test_blocks_of_the_store_come_back_and_what_is_behind_them_is_left_alone() -> None:
    kv = torch.randn(3, 2 * HEADS, 4 * 8, WIDTH)
    blocks = to_blocks(kv, 8)
    assert len(blocks) == 4
    shape = (2 * HEADS, 8, WIDTH)
    assert torch.equal(from_blocks(blocks, 3, shape, kv.dtype).transpose(1, 2), kv)
    assert torch.equal(from_blocks(blocks[1:], 2, shape, kv.dtype).transpose(1, 2), kv[:2, :, 8:])
    with pytest.raises(ValueError, match="fewer than"):
        from_blocks(blocks, 4, shape, kv.dtype)
