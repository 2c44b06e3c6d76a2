"""Small random encoders and a small task that they can learn: real models, fast enough."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

WORDS = ("good", "bad", "film", "plot", "the", "a", "very", "not", "quite", "actor")
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    # Wide enough for layers and positions to matter.
    "initializer_range": 0.3,
}


def save_random_bert(directory: Path, *, seed: int = 0) -> Path:
    """Write a random BERT over ``WORDS`` in Hugging Face form, with its tokenizer."""
    torch.manual_seed(seed)
    vocab = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    model = BertModel(BertConfig(vocab_size=len(vocab), **BERT), add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):  # at 1 and 0 they could be left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write_texts(file: Path, rows: int, *, seed: int = 0) -> Path:
    """Write texts whose label is whether they hold more of ``good`` than of ``bad``."""
    rng = random.Random(seed)
    lines = []
    while len(lines) < rows:
        words = rng.choices(WORDS, k=rng.randint(3, 12))
        balance = words.count("good") - words.count("bad")
        if balance:
            label = "praise" if balance > 0 else "blame"
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
    file.write_text("\n".join(lines) + "\n")
    return file
