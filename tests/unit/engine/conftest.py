"""Engines over a small random model, where both stages are real and fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from fathom.config import EngineConfig
from fathom.engine.build import assemble
from fathom.engine.engine import Engine
from fathom.kvstore.store import KVStore
from fathom.models.adapters import Adapter
from fathom.models.decoder import Decoder
from fathom.models.heads import build_exit_head
from fathom.models.load import load_decoder
from fathom.types import ComputePolicy, Request, RequestOutput, SamplingParams
from tests.tiny_models import save_random_llama

EXIT_LAYER = 2
NUM_LAYERS = 4


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("tiny"), vocab_size=40)


@pytest.fixture(scope="session")
def decoder(model_dir: Path) -> Decoder:
    return load_decoder(model_dir, dtype=torch.float32)


@pytest.fixture(scope="session")
def exit_adapter(model_dir: Path) -> Adapter:
    """An exit layer, changed a little from the model's own, and a head over half its tokens."""
    import transformers  # deep replicas in processes of their own import this file, and no more

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    layers = {
        f"{index}.{name}": tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for index in range(EXIT_LAYER, EXIT_LAYER + 1)
        for name, tensor in model.model.layers[index].state_dict().items()
    }
    return Adapter(
        exit_layer=EXIT_LAYER,
        exit_layers=1,
        norm=model.model.norm.weight.detach(),
        token_ids=torch.arange(39, 2, -1),
        layers=layers,
        digest="exit-adapter",
    )


MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(decoder: Decoder, model_dir: Path) -> MakeEngine:
    """Builds an engine; keywords are EngineConfig's fields, or those below."""

    def make(
        num_blocks: int = 256,
        wrap_deep=lambda deep: deep,
        trained: Adapter | None = None,
        store: KVStore | None = None,
        **fields,
    ) -> Engine:
        return make_engine_of(decoder, model_dir, num_blocks, wrap_deep, trained, store, **fields)

    return make


def make_engine_of(
    decoder: Decoder,
    directory: Path,
    num_blocks: int,
    wrap_deep=lambda d: d,
    trained: Adapter | None = None,
    store: KVStore | None = None,
    **fields,
) -> Engine:
    config = EngineConfig(
        model=str(directory),
        dtype="float32",
        block_size=fields.pop("block_size", 8),
        pause_drafting=fields.pop("pause_drafting", False),  # depths must not depend on speed
        **fields,
    )
    num_layers = NUM_LAYERS + (trained.exit_layers if trained else 0)
    block_bytes = num_layers * 2 * 2 * 8 * config.block_size * 4
    config = dataclasses.replace(config, kv_cache_bytes=num_blocks * block_bytes)
    return assemble(
        config,
        decoder,
        build_exit_head(decoder, directory, trained, config.exit_vocab),
        exit_layer=EXIT_LAYER,
        weights_digest="tiny",
        adapter=trained,
        wrap_deep=wrap_deep,
        store=store,
    )


def request(
    name: str,
    prompt: Iterable[int],
    compute: ComputePolicy | None = None,
    n: int = 1,
    timeout_s: float | None = None,
    **sampling,
) -> Request:
    sampling.setdefault("max_tokens", 24)
    sampling.setdefault("ignore_eos", True)
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**sampling),
        compute=compute or ComputePolicy(),
        n=n,
        timeout_s=timeout_s,
    )


@dataclasses.dataclass
class Completion:
    """All that came of one completion."""

    ids: list[int]
    depths: list[int]
    last: RequestOutput | None = None


def run(engine: Engine, requests: Iterable[Request]) -> dict[tuple[str, int], Completion]:
    """Add all requests at once and step to the end; blocks and sequences must add up."""
    for item in requests:
        engine.add_request(item)
    return drain(engine)


def drain(engine: Engine) -> dict[tuple[str, int], Completion]:
    completions: dict[tuple[str, int], Completion] = {}
    while engine.has_work():
        for output in engine.step():
            done = completions.setdefault((output.request_id, output.index), Completion([], []))
            assert done.last is None or done.last.finish_reason is None
            done.ids += [token.id for token in output.tokens]
            done.depths += [token.depth for token in output.tokens]
            done.last = output
    engine.check_integrity()
    assert engine.stats()["kv_cache_usage_perc"] == 0
    return completions


def run_one(engine: Engine, item: Request) -> Completion:
    return run(engine, [item])[item.request_id, 0]
