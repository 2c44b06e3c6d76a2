"""A real model, tiny and random, behind the real engine and the real application, in process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fathom.api.app import create_app
from fathom.api.auth import digest
from fathom.api.convert import Defaults
from fathom.api.local import LocalBackend
from fathom.api.service import Service
from fathom.config import EngineConfig
from fathom.engine.async_engine import AsyncEngine
from fathom.models.tokenizer import Tokenizer, load_tokenizer
from fathom.types import ComputePolicy

KEY = "unit-key"
MODEL = "tiny"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers over bytes: vocabulary 0..255 and an end token, 256."""
    path = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>")
    hf.chat_template = TEMPLATE
    hf.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=256,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> AsyncEngine:
    return AsyncEngine.from_config(
        EngineConfig(
            model=str(tiny_model),
            dtype="float32",
            threads=1,
            kv_cache_bytes=4 << 20,
            exit_layer=2,
            exit_head="shared",
        )
    )


@pytest.fixture(scope="session")
def service(engine: AsyncEngine, tokenizer: Tokenizer) -> Service:
    return Service(
        backend=LocalBackend(engine, interval_s=0.0),
        tokenizer=tokenizer,
        model_name=MODEL,
        defaults=Defaults(compute=ComputePolicy(), timeout_s=60),
    )


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[TestClient]:
    app = create_app(service, key_digests=[digest("other"), digest(KEY)], max_body_bytes=10_000)
    with TestClient(
        app, headers={"Authorization": f"Bearer {KEY}"}, raise_server_exceptions=False
    ) as client:
        yield client
