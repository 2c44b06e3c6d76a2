"""The engine on an NVIDIA GPU gives the tokens that it gives on the CPU, captured or not."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.types import AcceptMode, ComputePolicy, Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def run(device: str, mode: AcceptMode, **fields) -> tuple[list[list[int]], Engine]:
    config = EngineConfig(device=device, pause_drafting=False, **{"dtype": "float32", **fields})
    engine = Engine.from_config(config)
    for index in range(4):
        engine.add_request(
            Request(
                request_id=str(index),
                prompt_token_ids=tuple(range(100, 110 + 7 * index)),
                sampling=SamplingParams(max_tokens=32, ignore_eos=True),
                compute=ComputePolicy(mode=mode),
            )
        )
    found: list[list[int]] = [[] for _ in range(4)]
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)] += [token.id for token in output.tokens]
    engine.check_integrity()
    return found, engine


def tokens(device: str, mode: AcceptMode, **fields) -> list[list[int]]:
    return run(device, mode, **fields)[0]


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("mode", [AcceptMode.FULL, AcceptMode.EXACT])
def test_float32_tokens_are_the_cpus(mode: AcceptMode, cuda_graphs: bool) -> None:
    expected = tokens("cpu", AcceptMode.FULL)
    assert tokens("cuda", mode, cuda_graphs=cuda_graphs) == expected


def test_free_gives_what_it_gives_on_a_cpu() -> None:
    assert tokens("cuda", AcceptMode.FREE) == tokens("cpu", AcceptMode.FREE)


def test_passes_are_captured() -> None:
    _, engine = run("cuda", AcceptMode.EXACT)
    graphs = engine._shallow._stage.graphs
    assert graphs is not None and not graphs._failed
    assert any(bucket.captured for bucket in graphs._buckets.values())


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flashinfer_serves_half_precision(dtype: str) -> None:
    """Rounding may part two answers somewhere, not at the first tokens."""
    found, engine = run("cuda", AcceptMode.FULL, dtype=dtype)
    assert engine.info.attention == "flashinfer"
    expected = tokens("cuda", AcceptMode.FULL, dtype=dtype, attention="sdpa", cuda_graphs=False)
    assert [answer[:4] for answer in found] == [answer[:4] for answer in expected]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_few_bits_keep_the_promise_of_exact(quantization: str) -> None:
    full = tokens("cuda", AcceptMode.FULL, quantization=quantization)
    assert tokens("cuda", AcceptMode.EXACT, quantization=quantization) == full
