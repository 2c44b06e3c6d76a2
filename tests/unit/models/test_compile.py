"""Compiled layers compute what eager ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fathom.models.decoder import Decoder
from fathom.models.errors import ModelError
from fathom.models.kernel_linear import KernelLinear
from fathom.models.load import load_decoder
from tests.tiny_models import save_random_llama
from tests.unit.reference_attention import ContiguousAttention


def states(decoder: Decoder, passes: list[int]) -> torch.Tensor:
    """Run one sequence in passes of so many rows; returns the last pass's states."""
    attend, first = ContiguousAttention(4, 2), 0
    out = torch.empty(0)
    for rows in passes:
        positions = torch.arange(first, first + rows)
        attend.set_rows([0] * rows, positions.tolist())
        out = decoder.run(decoder.embed(positions), positions, 0, 4, attend)
        first += rows
    return out


@pytest.mark.slow  # the C++ compiler: 17 s, minutes on a busy machine
@pytest.mark.timeout(900)
def test_compiled_layers_give_what_eager_ones_give(tmp_path: Path) -> None:
    save_random_llama(tmp_path, vocab_size=40)
    decoder = load_decoder(tmp_path, dtype=torch.float16)  # torch computes it, packed by nobody
    expected = states(decoder, [9, 1, 3])
    decoder.compile()
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = states(decoder, [9, 1, 3])
    # Fused, less is rounded to float16 on the way.
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=1e-2 * scale)
    # Two parts of a layer, for one row and for more: layers share what is compiled.
    assert 0 < counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


def test_what_our_kernels_run_is_not_compiled(tmp_path: Path) -> None:
    save_random_llama(tmp_path, hidden_size=64, intermediate_size=96, vocab_size=97)
    decoder = load_decoder(tmp_path, dtype=torch.float32, layer_bits=[8] * 4)
    if not isinstance(decoder.layers[0].qkv, KernelLinear):
        pytest.skip("needs a C++ compiler")
    with pytest.raises(ModelError, match=r"compile: on cpu with float32, .*: leave it out"):
        decoder.compile()
    packed = load_decoder(tmp_path, dtype=torch.float32)
    if packed.layers[0].qkv.packed:
        with pytest.raises(ModelError, match="oneDNN's"):
            packed.compile()
