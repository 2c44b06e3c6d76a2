"""A tiny random model with a tokenizer, and examples that it wrote itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from fathom.training.examples import Example
from tests.tiny_models import save_random_llama, tiny_model

__all__ = ["tiny_model"]

VOCAB = 40


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A random Llama of four layers that says different things to different prompts."""
    path = tmp_path_factory.mktemp("writer")
    for file in tiny_model.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return save_random_llama(path, vocab_size=VOCAB)


@pytest.fixture
def base(model_dir: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@pytest.fixture(scope="session")
def examples(model_dir: Path) -> list[Example]:
    """Greedy answers of the model to random prompts, of several lengths."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(96):
        length = 3 + index % 7
        prompt = torch.randint(3, VOCAB, (1, length), generator=generator)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8 + index % 9,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found.append(Example(tuple(out[0].tolist()), length, f"domain{index % 2}"))
    return found
