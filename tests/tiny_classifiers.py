"""Small random encoders and a small task that they can learn: real models, fast enough."""

from __future__ import annotations

import dataclasses
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
    "initializer_range": 0.15,
}


def save_random_bert(directory: Path, *, seed: int = 0) -> Path:
    """Write a random BERT over ``WORDS`` in Hugging Face form, with its tokenizer."""
    torch.manual_seed(seed)
    vocab = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    model = BertModel(BertConfig(vocab_size=len(vocab), **BERT), add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        # At 1 and 0 they could be left out.
        if name.endswith("LayerNorm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.3, 0.3)
    model.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def texts(rows: int, *, seed: int) -> list[str]:
    """Texts that hold more of ``good`` or more of ``bad``."""
    rng = random.Random(seed)
    found: list[str] = []
    while len(found) < rows:
        words = rng.choices(WORDS, k=rng.randint(3, 12))
        if words.count("good") != words.count("bad"):
            found.append(" ".join(words))
    return found


def write_texts(file: Path, rows: int, *, seed: int = 0) -> Path:
    """Write texts with whichever they hold more of as their label."""
    lines = []
    for text in texts(rows, seed=seed):
        words = text.split()
        label = "praise" if words.count("good") > words.count("bad") else "blame"
        lines.append(json.dumps({"text": text, "label": label}))
    file.write_text("\n".join(lines) + "\n")
    return file


def save_classifier(folder: Path, *, rows: int = 1200, heldout: int = 2000) -> Path:
    """Train a text classifier of three heads on the small task, in about a second.

    It is calibrated on agreement with its last head, so that every budget is worth spending.
    """
    from fathom.training.labelled import read_labelled
    from fathom.training.multi_exit import MultiExitTraining, train_multi_exit

    work = folder / "work"
    work.mkdir(parents=True)
    encoder = save_random_bert(folder / "bert")
    plan = MultiExitTraining(
        name="mood", encoder=str(encoder), hidden=16, epochs=4, learning_rate=5e-3, max_tokens=32
    )
    data = read_labelled(write_texts(work / "train.jsonl", rows))
    kept = read_labelled(write_texts(work / "heldout.jsonl", heldout, seed=1))
    files = train_multi_exit(plan, data, kept, work, show=False)
    answers = files.calibration
    agreement = dataclasses.replace(answers, labels=answers.predicted[:, -1])
    dataclasses.replace(files, calibration=agreement).write(folder / "classifier")
    return folder / "classifier"
