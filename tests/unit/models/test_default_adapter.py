"""The adapter that ships leaves the real model's full depth as it was, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.types import AcceptMode, ComputePolicy, Request, SamplingParams, Token

FULL = ComputePolicy(mode=AcceptMode.FULL)
CHATS = (
    "Tom has 3 boxes with 12 apples each and gives 7 away. How many apples are left?",
    "Translate German to English: Zwei Hunde spielen im Schnee.",
)


def build(model: Path, adapter: str, dtype: str) -> Engine:
    return Engine.from_config(
        EngineConfig(
            model=str(model), adapter=adapter, dtype=dtype, threads=1, kv_cache_bytes=64 << 20
        )
    )


def scored(engine: Engine, compute: ComputePolicy) -> list[list[Token]]:
    """Each chat's prompt and greedy answer, every token with its five best log-probabilities."""
    assert engine.tokenizer is not None
    params = SamplingParams(max_tokens=12, logprobs=5, prompt_logprobs=5)
    for index, chat in enumerate(CHATS):
        prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": chat}])
        engine.add_request(
            Request(
                request_id=str(index),
                prompt_token_ids=tuple(prompt),
                sampling=params,
                compute=compute,
            )
        )
    found: list[list[Token]] = [[] for _ in CHATS]
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)] += [*(output.prompt_tokens or ()), *output.tokens]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_depth_is_the_base_models(default_model: Path, dtype: str) -> None:
    with_adapter = build(default_model, "default", dtype)
    base = build(default_model, "none", dtype)
    assert with_adapter.info.adapter == "default"
    assert base.info.adapter == ""
    expected = scored(base, FULL)
    assert all(len(tokens) > 40 for tokens in expected)
    # Not approximately: ids, depths and all log-probabilities.
    assert scored(with_adapter, FULL) == expected
    if dtype == "float32":  # in bfloat16 sums are rounded by the number of a pass's rows
        drafted = scored(with_adapter, ComputePolicy(mode=AcceptMode.EXACT, exit_threshold=0.5))
        assert [[token.id for token in tokens] for tokens in drafted] == [
            [token.id for token in tokens] for tokens in expected
        ]
        assert any(token.depth == 8 for tokens in drafted for token in tokens)
