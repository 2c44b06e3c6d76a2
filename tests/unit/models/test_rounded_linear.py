"""Weights of few bits in torch alone compute with exactly what rounding left of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fathom.models import kernel_linear
from fathom.models.kernel_linear import KernelLinear
from fathom.models.load import load_decoder
from fathom.models.quantized import round_weight
from fathom.models.rounded_linear import RoundedLinear
from tests.tiny_models import save_random_llama
from tests.unit.reference_attention import ContiguousAttention


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_the_rounded_one(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 64), torch.randn(24), torch.randn(5, 64).to(dtype)
    linear = RoundedLinear(weight, bias, bits=bits)
    rounded = round_weight(weight, bits).floats().to(dtype)
    torch.testing.assert_close(linear.weight(dtype), rounded)
    assert torch.equal(linear(x), F.linear(x, linear.weight(dtype), bias.to(dtype)))
    assert linear.num_weights == 24 * 65
    assert linear.nbytes == 24 * 64 * bits // 8 + 24 * 2 * 2 * 2


@pytest.mark.parametrize("bits", [4, 8])
def test_what_comes_before_and_after(bits: int) -> None:
    torch.manual_seed(0)
    linear = RoundedLinear(torch.randn(64, 64), bits=bits)
    norm, x = torch.rand(64) + 0.5, torch.randn(3, 64)
    normed = F.rms_norm(x, (64,), norm, 1e-5)
    torch.testing.assert_close(linear.normed(x, norm, 1e-5), linear(normed))
    torch.testing.assert_close(linear.added(x, x), linear(x) + x)
    gate, up = linear(normed).chunk(2, -1)
    torch.testing.assert_close(linear.normed_gated(x, norm, 1e-5), F.silu(gate) * up)


def test_a_decoder_without_our_kernels_stays_near_one_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel_linear.optional_library() is None:
        pytest.skip("needs a C++ compiler")
    save_random_llama(tmp_path, hidden_size=64, intermediate_size=96, vocab_size=97)

    def logits(bits: int) -> torch.Tensor:
        decoder = load_decoder(tmp_path, dtype=torch.float32, layer_bits=[bits] * 4)
        kinds.add(type(decoder.layers[0].qkv))
        attend = ContiguousAttention(4, 2)
        attend.set_rows([0] * 7, list(range(7)))
        hidden = decoder.embed(torch.arange(7))
        return decoder.logits(decoder.run(hidden, torch.arange(7), 0, 4, attend))

    kinds: set[type] = set()
    own = logits(8)
    monkeypatch.setattr(kernel_linear, "optional_library", lambda: None)
    without, whole = logits(8), logits(0)
    assert kinds >= {KernelLinear, RoundedLinear}

    def off(other: torch.Tensor) -> float:
        return float((without - other).norm() / whole.norm())

    assert 0 < off(whole) < 0.05
    assert off(own) < 0.15  # our kernels round activations, too
