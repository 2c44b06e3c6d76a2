"""A tiny random model, made-up data sets, and rows and a head that come of them."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers

from fathom.training.collect import CollectSettings, collect
from fathom.training.exit_head import load_model
from fathom.training.rows import join, load_rows, split_validation
from fathom.training.train import TrainableHead, TrainSettings, fit_linear, train_head
from tests.tiny_models import save_random_llama

LAYER = 2
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [f"w{number}" for number in range(37)]
VOCAB = len(SPECIAL) + len(WORDS)
SETTINGS = CollectSettings(
    model="tiny",
    layers=(1, LAYER),
    answer_batches=2,
    batch=4,
    max_new_tokens=12,
    text_batches=8,
    text_batch=48,
    text_length=32,
    seed=0,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_random_llama(directory, vocab_size=VOCAB)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = "{% for m in messages %}{{ '<s> ' + m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(model_dir: Path) -> SimpleNamespace:
    """The model in bfloat16 and its tokenizer, as the command loads them."""
    module, tokenizer = load_model(str(model_dir))
    return SimpleNamespace(module=module, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set, a few rows of random words each."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    def write(name: str, rows: list[dict]) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        opener: Callable = lzma.open if path.suffix == ".xz" else gzip.open
        with opener(path, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    for split in ("train", "test_a"):
        rows = [{"question": text(9), "answer": text(5)} for _ in range(12)]
        write(f"gsm8k/{split}.jsonl.gz", rows)
    write("scitldr/train.jsonl.gz", [{"source": [text(6)] * 3} for _ in range(12)])
    write("multi30k/train.jsonl.gz", [{"de": text(6), "en": text(6)} for _ in range(12)])
    turns = [{"category": "c", "turns": [text(9), text(2)]} for _ in range(12)]
    write("spec_bench/questions_a.jsonl.gz", turns)
    for split in ("train", "val"):
        # Long enough for the passages of the command's own length.
        write(f"classics/classics_{split}.jsonl.xz", [{"text": text(3000)} for _ in range(3)])
    return folder


@pytest.fixture(autouse=True)
def use_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_DATA", str(data))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, data: Path, model: SimpleNamespace) -> Path:
    work_dir = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FATHOM_DATA", str(data))
        collect(SETTINGS, work_dir, model.module, model.tokenizer)
    return work_dir


@pytest.fixture(scope="module")
def trained(collected: Path, model: SimpleNamespace) -> SimpleNamespace:
    """A head trained on half the vocabulary, the untrained one, and what they were trained with."""
    rows = join(list(load_rows(collected, "train", LAYER).values()))
    ranked = torch.bincount(rows.argmax, minlength=VOCAB).argsort(descending=True, stable=True)
    train, valid = split_validation(rows)
    norm, eps = model.module.model.norm.weight, model.module.config.rms_norm_eps
    untrained, head = TrainableHead(norm, eps), TrainableHead(norm, eps)
    fit_linear(head, train)
    lm_weight = model.module.lm_head.weight.detach()
    settings = TrainSettings(subset=VOCAB // 2, steps=200, batch=128, learning_rate=5e-3)
    summary = train_head(head, train, valid, lm_weight, ranked, settings)
    return SimpleNamespace(
        head=head,
        untrained=untrained,
        train=train,
        lm_weight=lm_weight,
        ranked=ranked,
        subset=settings.subset,
        summary=summary,
    )
