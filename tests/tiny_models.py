"""Random Llamas of a few thousand weights: real models, fast enough for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide enough for layers to disagree often, but not always.
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_random_llama(directory: Path, *, seed: int = 1, **changes: object) -> Path:
    """Write a random model in Hugging Face form, without a tokenizer.

    Args:
        changes: fields of ``LlamaConfig`` that differ from ``TINY``; ``vocab_size`` has no default.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds to import

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))
    # A norm weight of 1 would hide a norm that is left out.
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> Path:
    """Write a tokenizer over bytes: vocabulary 0..255 and an end token, 256."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>")
    hf.chat_template = TEMPLATE
    hf.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over bytes, with its tokenizer."""
    path = save_byte_tokenizer(tmp_path_factory.mktemp("tiny"))
    return save_random_llama(
        path,
        seed=0,
        vocab_size=257,
        max_position_embeddings=128,
        initializer_range=0.02,
        tie_word_embeddings=True,
        eos_token_id=256,
        bos_token_id=None,
    )
