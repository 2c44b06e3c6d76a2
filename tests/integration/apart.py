"""Requests over shallow and deep replicas, and over an engine in one process, to compare."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from fathom.config import EngineConfig
from fathom.engine.build import build_engine
from fathom.types import AcceptMode, ComputePolicy, Request, RequestOutput, SamplingParams
from tests.tiny_models import save_random_llama

MAX_TOKENS = 120


def save_model(directory: Path, tiny: Path) -> Path:
    """A random Llama with the tiny one's tokenizer, whose layers disagree often but not always."""
    shutil.copytree(tiny, directory, dirs_exist_ok=True)
    return save_random_llama(directory, seed=2, vocab_size=257, eos_token_id=256, bos_token_id=None)


def engine_settings(model: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        dtype="float32",
        kv_cache_bytes=8 << 20,
        threads=1,
        adapter="none",
        pause_drafting=False,  # depths must not depend on speed
    )


def requests_of(seed: int, count: int = 3, max_tokens: int = MAX_TOKENS) -> list[Request]:
    """Greedy ones in every mode, with common prefixes among them."""
    chance = random.Random(seed)
    common = [chance.randrange(256) for _ in range(40)]
    found = []
    for mode in AcceptMode:
        for number in range(count):
            prompt = [*common[: 20 * number], *(chance.randrange(256) for _ in range(9))]
            found.append(
                Request(
                    request_id=f"{seed}-{mode}-{number}",
                    prompt_token_ids=tuple(prompt),
                    sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                    compute=ComputePolicy(mode=mode, exit_threshold=0.05),
                )
            )
    return found


def tokens_of(outputs: Iterable[RequestOutput]) -> list[tuple[int, int]]:
    """(token, depth) of a request's only completion."""
    return [(token.id, token.depth) for output in outputs for token in output.tokens]


def in_one_process(settings: EngineConfig, requests: Sequence[Request]) -> list:
    """What the requests give one after another in an engine here."""
    engine = build_engine(settings)
    found = []
    for request in requests:
        engine.add_request(request)
        outputs: list[RequestOutput] = []
        while engine.has_work():
            outputs += engine.step()
        found.append(tokens_of(outputs))
    engine.close()
    return found
