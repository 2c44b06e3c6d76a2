"""Attention backends on a GPU agree with SDPA, which agrees with the CPU's; captured passes too."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fathom.attention.backend import AttentionBackend, RaggedBatch, SequenceRows
from fathom.attention.choice import choose_backend, name_of
from fathom.attention.fixed import FixedBackend, width_of
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

HEADS, KV_HEADS, SIZE = 9, 3, 16
PASSES = {
    "decode": [SequenceRows(range(1 + 40 * i, 41 + 40 * i), 100 + 97 * i, 1) for i in range(6)],
    "flush": [SequenceRows(range(1 + 40 * i, 41 + 40 * i), 100 + 50 * i, 3 + i) for i in range(6)],
    "prompts": [SequenceRows(range(1, 41), 0, 600), SequenceRows(range(41, 81), 13, 130)],
}
HALVES = [torch.float16, torch.bfloat16]
needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer"
)


def a_pool(dtype: torch.dtype, device: str, dim: int = 64) -> KVPool:
    pool = KVPool(
        num_layers=2,
        num_kv_heads=KV_HEADS,
        head_dim=dim,
        num_blocks=260,
        block_size=SIZE,
        dtype=dtype,
        device=device,
    )
    values = torch.randn(pool.data.shape, generator=torch.Generator().manual_seed(0))
    values[:, :, :SIZE] = 0
    pool.data.copy_(values)
    return pool


def inputs(rows: int, dtype: torch.dtype, device: str, dim: int = 64) -> list[torch.Tensor]:
    """Queries, and keys and values, as the decoder gives them: views of one buffer."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, dim, generator=generator).to(device, dtype)
    return [qkv[:, :HEADS], qkv[:, HEADS:]]


def attend(backend: AttentionBackend, sequences, dtype, device: str, dim: int = 64):
    pool = a_pool(dtype, device, dim)
    batch = RaggedBatch.build(sequences, pool)
    own = inputs(batch.num_rows, dtype, device, dim)
    return backend.plan(batch, pool, HEADS)(1, *own).float().cpu(), pool.data.float().cpu()


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_sdpa_is_what_it_is_on_a_cpu(rows, dtype):
    expected = attend(SdpaBackend(), PASSES[rows], torch.float32, "cpu")[0]
    close(attend(SdpaBackend(), PASSES[rows], dtype, "cuda")[0], expected, dtype)


@needs_flashinfer
@pytest.mark.parametrize("rows", PASSES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [64, 128])
def test_flashinfer(rows, dtype, dim):
    backend = choose_backend("flashinfer", a_pool(dtype, "cuda", dim), HEADS)
    expected, pool = attend(SdpaBackend(), PASSES[rows], dtype, "cuda", dim)
    found, own = attend(backend, PASSES[rows], dtype, "cuda", dim)
    close(found, expected, dtype)
    assert torch.equal(own, pool)


@needs_flashinfer
def test_passes_of_one_flashinfer_backend_may_alternate():
    backend = choose_backend("flashinfer", a_pool(torch.bfloat16, "cuda"), HEADS)
    pool = a_pool(torch.bfloat16, "cuda")
    plans = []
    for sequences in (PASSES["decode"], PASSES["flush"]):
        batch = RaggedBatch.build(sequences, pool)
        own = inputs(batch.num_rows, torch.bfloat16, "cuda")
        plans.append((backend.plan(batch, pool, HEADS), own))
    first = plans[0][0](0, *plans[0][1]).clone()
    plans[1][0](0, *plans[1][1])
    torch.testing.assert_close(plans[0][0](0, *plans[0][1]), first)


@needs_flashinfer
def test_auto_is_flashinfer_where_it_is_installed():
    assert name_of(choose_backend("auto", a_pool(torch.bfloat16, "cuda"), HEADS)) == "flashinfer"


@pytest.mark.parametrize("rows", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_flex(rows, dtype):
    backend = choose_backend("flex", a_pool(dtype, "cuda"), HEADS)
    expected = attend(SdpaBackend(), PASSES[rows], dtype, "cuda")[0]
    found = attend(backend, PASSES[rows], dtype, "cuda")[0]
    close(found, expected, torch.bfloat16 if dtype is torch.float32 else dtype)  # TF32, perhaps


@pytest.mark.parametrize("rows", ["decode", "flush"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["sdpa", pytest.param("flashinfer", marks=needs_flashinfer)])
def test_fixed_passes(rows, dtype, name):
    sequences = PASSES[rows]
    pool = a_pool(dtype, "cuda")
    backend = choose_backend(name, pool, HEADS)
    assert isinstance(backend, FixedBackend)
    count = sum(each.num_rows for each in sequences)
    size = 1 << (count - 1).bit_length()
    fixed = backend.fixed(size, width_of(sequences, SIZE), pool, HEADS)
    q, kv = inputs(count, dtype, "cuda")
    padded = [torch.cat([t, t.new_zeros(size - count, *t.shape[1:])]) for t in (q, kv)]
    for _ in range(2):  # buffers are filled anew
        fixed.fill(sequences)
        found = fixed.attend(1, *padded)[:count].float().cpu()
    close(found, attend(SdpaBackend(), sequences, dtype, "cuda")[0], dtype)
