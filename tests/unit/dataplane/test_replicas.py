"""Both halves built from one configuration: each has its own layers, together the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.config import EngineConfig
from fathom.dataplane.replicas import DeepHost, build_shallow, start_deep
from fathom.engine.build import build_engine
from fathom.engine.deep import DeepLost
from fathom.engine.engine import Engine
from fathom.types import AcceptMode, ComputePolicy
from tests.tiny_models import tiny_model
from tests.unit.dataplane.conftest import TOKEN
from tests.unit.engine.conftest import request, run

__all__ = ["tiny_model"]

PROMPTS = [[7, 3, 9, 1, 4], [5] * 30, list(range(2, 39))]


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> EngineConfig:
    return EngineConfig(
        model=str(tiny_model), dtype="float32", adapter="none", exit_layer=2, kv_cache_bytes=1 << 20
    )


@pytest.fixture(scope="module")
def host(config: EngineConfig) -> Iterator[DeepHost]:
    found = start_deep(config, leases=2, token=TOKEN)
    yield found
    found.close()


def weights_of(engine: Engine) -> int:
    return engine._shallow._stage.decoder.num_weights


@pytest.mark.parametrize("mode", list(AcceptMode))
def test_outputs_are_those_of_one_process(config, host: DeepHost, mode: AcceptMode) -> None:
    compute = ComputePolicy(mode=mode, exit_threshold=0.0, max_stack=4)
    items = [request(str(i), prompt, compute) for i, prompt in enumerate(PROMPTS)]
    whole = build_engine(config)
    split = build_shallow(config, lambda: [host.address], token=TOKEN)
    expected, found = run(whole, items), run(split, items)
    assert {k: v.ids for k, v in found.items()} == {k: v.ids for k, v in expected.items()}
    assert {k: v.depths for k, v in found.items()} == {k: v.depths for k, v in expected.items()}
    split.close()


def test_each_holds_its_own_weights_and_no_more(config, host: DeepHost) -> None:
    whole = build_engine(config)
    model = whole._shallow._stage.decoder
    layer, table = model.layers[0].num_weights, model.embedding.numel()
    norm = model.norm.numel()
    # Without an adapter the exit head is the model's own, the LM head included.
    split = build_shallow(config, lambda: [host.address], token=TOKEN)
    assert weights_of(whole) == 2 * table + norm + model.config.num_layers * layer
    assert weights_of(split) == 2 * table + norm + 2 * layer
    assert host.num_weights == table + norm + (model.config.num_layers - 2) * layer
    split.close()
    small = EngineConfig(**{**_fields(config), "exit_vocab": 8})
    split = build_shallow(small, lambda: [host.address], token=TOKEN)
    assert weights_of(split) == table + 2 * layer
    split.close()


def test_leases_run_out_and_come_back(config, host: DeepHost) -> None:
    engines = [build_shallow(config, lambda: [host.address], token=TOKEN) for _ in range(2)]
    assert host.free_leases == 0
    with pytest.raises(DeepLost, match="add deep replicas"):
        build_shallow(config, lambda: [host.address], token=TOKEN)
    engines[0].close()
    again = build_shallow(config, lambda: [host.address], token=TOKEN, wait_s=10)
    assert host.stats()["free_leases"] == 0
    host.check_health()
    for engine in (engines[1], again):
        engine.close()


def test_nobody_to_flush_to_is_said_with_the_reason(config) -> None:
    with pytest.raises(DeepLost, match="there is no deep replica"):
        build_shallow(config, list, token=TOKEN)


def _fields(config: EngineConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
