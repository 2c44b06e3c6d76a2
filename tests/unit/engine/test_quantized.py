"""An engine whose stages have weights of few bits: every mode keeps its promise about its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.config import ConfigError, EngineConfig
from fathom.engine.build import build_engine
from fathom.engine.engine import Engine
from fathom.kernels.compiled import optional_library
from fathom.types import AcceptMode, ComputePolicy, Confidence
from tests.tiny_models import save_byte_tokenizer, save_random_llama
from tests.unit.engine.conftest import request

pytestmark = pytest.mark.skipif(optional_library() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_byte_tokenizer(tmp_path_factory.mktemp("wide"))
    return save_random_llama(path, hidden_size=64, intermediate_size=96, vocab_size=257)


def new_engine(directory: Path, quantization: str, **fields) -> Engine:
    return build_engine(
        EngineConfig(
            model=str(directory),
            adapter="none",
            exit_layer=2,
            quantization=quantization,
            kv_cache_bytes=1 << 20,
            pause_drafting=False,
            **fields,
        )
    )


def answers(engine: Engine, compute: ComputePolicy, prompts: list[range]) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        engine.add_request(request(str(index), prompt, compute))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)] += [token.id for token in output.tokens]
    return found


PROMPTS = [range(3, 9 + i) for i in range(5)]
FULL = ComputePolicy(mode=AcceptMode.FULL)
EXACT = ComputePolicy(
    mode=AcceptMode.EXACT, exit_threshold=0.1, confidence=Confidence.MAX_PROB, max_stack=5
)


@pytest.mark.parametrize("quantization", ["none", "int4", "int8", "int8:int4", "none:int8"])
def test_exact_gives_what_full_gives_also_in_bfloat16(directory: Path, quantization: str) -> None:
    alone = [answers(new_engine(directory, quantization), FULL, [prompt])[0] for prompt in PROMPTS]
    engine = new_engine(directory, quantization)
    assert answers(engine, EXACT, PROMPTS) == alone
    assert engine.ledger.total.exited > 0
    assert engine.info.quantization == quantization


def test_layers_in_one_call_give_what_they_give_one_by_one(directory: Path) -> None:
    """Fused or not, bit for bit; with a long prompt beside short ones, whose rows SDPA takes."""
    prompts = [*PROMPTS, range(40)]
    engines = [new_engine(directory, "int4") for _ in range(2)]
    for stage in (engines[1]._shallow._stage, engines[1].deep._stage):
        assert all(fused is not None for fused in stage._fused.values())
        stage._fused = dict.fromkeys(stage._fused)
    fused, one_by_one = (answers(engine, EXACT, prompts) for engine in engines)
    assert fused == one_by_one


def test_stages_of_other_bits_are_other_models(directory: Path) -> None:
    digests = {
        name: new_engine(directory, name).info.weights_digest
        for name in ("none", "int4", "int8", "int4:int8")
    }
    assert len(set(digests.values())) == 4
    plain = new_engine(directory, "none", dtype="float32")
    assert plain.info.weights_digest == digests["none"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization": "int2"}, "quantization must be none, int8, int4, or SHALLOW:DEEP"),
        ({"quantization": "int4", "dtype": "float16"}, "bfloat16 or float32 on a CPU, got float16"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**fields).validate()
