"""Small random models of every family, and the default model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fathom.models.decoder import Decoder
from fathom.models.errors import ModelError
from fathom.models.pull import pull
from tests.unit.reference_attention import ContiguousAttention

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 128,
}
# name -> (config class, what differs from SMALL)
VARIANTS: dict[str, tuple[type, dict]] = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-llama3-untied": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama-biases-wide-heads": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 20},
    ),
    "llama-longrope": (transformers.LlamaConfig, {"rope_parameters": LONG_ROPE}),
    "llama-dynamic": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 100}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-yarn": (transformers.Qwen2Config, {"rope_parameters": YARN_ROPE}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3-linear-bias": (
        transformers.Qwen3Config,
        {
            "head_dim": 24,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        },
    ),
}


def build_model(kind: type, changes: dict) -> transformers.PreTrainedModel:
    """A random model whose biases and norms are not trivial."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        kind(**{**SMALL, **changes}), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="session")
def small_models(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[transformers.PreTrainedModel, Path]]:
    """Name of a variant -> transformers' model, and the directory it is saved in."""
    made: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def make(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            model = build_model(*VARIANTS[name])
            model.save_pretrained(directory)
            made[name] = model, directory
        return made[name]

    return make


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Directory of the default model; fetched on first use."""
    try:
        return pull()
    except ModelError as error:
        pytest.skip(f"the default model is neither cached nor reachable: {error}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache."""
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def new_attention(decoder: Decoder) -> ContiguousAttention:
    return ContiguousAttention(decoder.config.num_heads, decoder.config.num_kv_heads)


def logits_of(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    """[len(ids), V] logits of one sequence."""
    attend = new_attention(decoder)
    positions = list(range(len(ids)))
    attend.set_rows([0] * len(ids), positions)
    hidden = decoder.run(
        decoder.embed(torch.tensor(ids)),
        torch.tensor(positions),
        0,
        decoder.config.num_layers,
        attend,
    )
    return decoder.logits(hidden)


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """The tokens that greedy decoding appends, one row a step after the prompt's pass."""
    attend = new_attention(decoder)
    rows, start, output = list(prompt), 0, []
    for _ in range(count):
        positions = list(range(start, start + len(rows)))
        attend.set_rows([0] * len(rows), positions)
        hidden = decoder.run(
            decoder.embed(torch.tensor(rows)),
            torch.tensor(positions),
            0,
            decoder.config.num_layers,
            attend,
        )
        token = int(decoder.logits(hidden[-1:]).argmax())
        output.append(token)
        start, rows = start + len(rows), [token]
    return output
