"""Weights of few bits: what rounding costs, and that products are those of the rounded weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.kernels.compiled import optional_library
from fathom.models.bits import Bits
from fathom.models.errors import ModelError
from fathom.models.kernel_linear import KernelLinear, runs_halves
from fathom.models.linear import Linear
from fathom.models.load import load_decoder
from fathom.models.quantized import round_weight
from tests.unit.models.conftest import logits_of

pytestmark = pytest.mark.skipif(optional_library() is None, reason="needs a C++ compiler")
HALVES = pytest.mark.skipif(
    not runs_halves(torch.bfloat16, torch.device("cpu"), []), reason="needs AVX-512 BF16"
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.1), (8, 0.006)])
def test_rounding_stays_within_half_a_step(bits: int, limit: float) -> None:
    weight = random(48, 96)
    rounded = round_weight(weight, bits)
    grouped = weight.view(48, 3, 32)
    step = (grouped.amax(-1) - grouped.amin(-1)) / (2**bits - 1)
    error = (rounded.floats().view(48, 3, 32) - grouped).abs()
    # Half a step, and what half precision adds to scale and minimum.
    assert (error <= (0.5 * step + 4e-3)[..., None]).all()
    assert relative(rounded.floats(), weight) < limit


def test_weights_that_have_been_rounded_so_lose_nothing() -> None:
    # A Q4_1 file: what its dequantized weights become is what they were.
    once = round_weight(random(64, 128), 4)
    assert torch.equal(round_weight(once.floats(), 4).floats(), once.floats())


def test_equal_weights_and_zeros_stay_what_they_are() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 0.75
    assert torch.equal(round_weight(weight, 4).floats(), weight)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 70),
    groups=st.integers(1, 5),
    rows=st.integers(1, 19),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_products_are_those_of_the_rounded_weights(out, groups, rows, bits, dtype, bias):
    weight, x = random(out, 32 * groups), random(rows, 32 * groups, seed=1).to(dtype)
    offset = random(out, seed=2) if bias else None
    got = KernelLinear(weight, offset, bits=bits)(x)
    expected = F.linear(x.float(), round_weight(weight, bits).floats(), offset)
    assert got.dtype is dtype
    # Activations have 8 bits: under 1% of the length of a row of products.
    error = (got.float() - expected).norm(dim=1)
    assert (error <= 0.02 * x.float().norm(dim=1) * weight.norm(dim=1).amax()).all()


@pytest.mark.parametrize("bits", [4, 8, pytest.param(16, marks=HALVES)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: int, threads: int) -> None:
    linear = KernelLinear(random(96, 64), bits=bits)
    x = random(11, 64, seed=1).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))
    finally:
        torch.set_num_threads(before)


@HALVES
@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 70), inputs=st.integers(1, 3), rows=st.integers(1, 9), bias=st.booleans())
def test_products_in_bfloat16_are_those_of_torch(out, inputs, rows, bias):
    weight, x = random(out, 32 * inputs).bfloat16(), random(rows, 32 * inputs, seed=1).bfloat16()
    offset = random(out, seed=2).bfloat16() if bias else None
    got = KernelLinear(weight, offset, bits=16)(x)
    expected = F.linear(x.float(), weight.float(), None if offset is None else offset.float())
    torch.testing.assert_close(got.float(), expected, rtol=8e-3, atol=1e-2)


@HALVES
def test_norm_residual_and_gate_in_bfloat16_are_those_of_torch() -> None:
    weight, x = random(128, 64).bfloat16() * 0.1, random(5, 64, seed=1).bfloat16()
    norm, residual = random(64, seed=2).bfloat16(), random(5, 128, seed=4).bfloat16()
    plain, ours = Linear(weight), KernelLinear(weight, bits=16)
    gated = KernelLinear(weight, bits=16, gated=True)
    for got, expected in (
        (ours.normed(x, norm.float(), 1e-5), plain.normed(x, norm, 1e-5)),
        (ours.added(x, residual), plain.added(x, residual)),
        (gated.normed_gated(x, norm.float(), 1e-5), plain.normed_gated(x, norm, 1e-5)),
    ):
        assert relative(got, expected) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_residual_and_gate_are_those_of_a_plain_linear(dtype: torch.dtype) -> None:
    weight, bias = random(128, 64) * 0.1, random(128, seed=3) * 0.1
    floats = round_weight(weight, 8).floats()
    plain = Linear(floats.to(dtype), bias.to(dtype))
    x, norm = random(5, 64, seed=1).to(dtype), random(64, seed=2)
    quantized = KernelLinear(weight, bias, bits=8)
    gated = KernelLinear(weight, bias, bits=8, gated=True)
    residual = random(5, 128, seed=4).to(dtype)
    kept = residual.clone()
    for got, expected in (
        (quantized.normed(x, norm, 1e-5), plain.normed(x, norm.to(dtype), 1e-5)),
        (quantized.added(x, residual), plain.added(x, residual)),
        (gated.normed_gated(x, norm, 1e-5), plain.normed_gated(x, norm.to(dtype), 1e-5)),
    ):
        assert got.shape == expected.shape
        assert relative(got, expected) < 0.02
    assert torch.equal(residual, kept)


def test_what_is_not_finite_shows_in_its_row_alone() -> None:
    x = random(3, 64)
    x[1, 40] = float("inf")
    out = KernelLinear(random(40, 64), bits=4)(x)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_widths_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ModelError, match="multiple of 32, got 48"):
        KernelLinear(random(8, 48), bits=4)
    with pytest.raises(ModelError, match="inner width that is a multiple of 32, got 40"):
        KernelLinear(random(80, 64), bits=4, gated=True)
    with pytest.raises(ModelError, match="not finite"):
        round_weight(torch.full((1, 32), float("nan")), 8)


@pytest.mark.parametrize(
    ("text", "bits"), [("none", (0, 0)), ("int4", (4, 4)), ("int8:none", (8, 0))]
)
def test_bits_are_read_as_they_are_named(text: str, bits: tuple[int, int]) -> None:
    assert Bits.parse(text) == bits
    assert Bits.parse(text).name == text
    assert Bits.parse(text).of_layers(1, 3) == [bits[0], bits[1], bits[1]]


@pytest.mark.parametrize("text", ["", "int3", "int4:", "int4:int8:int4", "4"])
def test_other_bits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text or "^$"):
        Bits.parse(text)


def test_a_model_in_8_bits_says_nearly_what_it_said(
    small_models: Callable[..., tuple[transformers.PreTrainedModel, Path]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    ids = list(range(3, 60))
    whole = logits_of(load_decoder(tmp_path, dtype=torch.float32), ids)
    for layer_bits, limit in (([8, 8, 8], 0.02), ([8, 0, 0], 0.02), ([4, 4, 8], 0.2)):
        decoder = load_decoder(tmp_path, dtype=torch.float32, layer_bits=layer_bits)
        assert relative(logits_of(decoder, ids), whole) < limit
        assert decoder.num_weights == load_decoder(tmp_path, dtype=torch.float32).num_weights
