"""The engine on an NVIDIA GPU gives the tokens that it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.types import AcceptMode, ComputePolicy, Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def tokens(device: str, mode: AcceptMode) -> list[list[int]]:
    engine = Engine.from_config(EngineConfig(device=device, dtype="float32"))
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
    return found


@pytest.mark.parametrize("mode", [AcceptMode.FULL, AcceptMode.EXACT])
def test_float32_tokens_are_the_cpus(mode: AcceptMode) -> None:
    assert tokens("cuda", mode) == tokens("cpu", AcceptMode.FULL)
