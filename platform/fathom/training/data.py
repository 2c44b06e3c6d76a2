"""Prompts and plain texts from the data sets in the folder that ``FATHOM_DATA`` names."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.training.errors import TrainingError

DATA_HELP = (
    "Set FATHOM_DATA to a folder with gsm8k/{train,test_a}.jsonl.gz (question, answer; "
    "huggingface.co/datasets/openai/gsm8k), scitldr/train.jsonl.gz (source, target; "
    "huggingface.co/datasets/allenai/scitldr), multi30k/train.jsonl.gz (de, en; "
    "huggingface.co/datasets/bentrevett/multi30k), spec_bench/questions_a.jsonl.gz (category, "
    "turns; github.com/hemingkx/Spec-Bench) and classics/classics_{train,val}.jsonl.xz (title, "
    "author, text: public-domain books, e.g. from gutenberg.org)."
)

# General questions of our own making: the other sets cover arithmetic, summaries and translation.
TOPICS = (
    "photosynthesis", "the water cycle", "black holes", "inflation", "the French Revolution",
    "compound interest", "vaccines", "recursion in programming", "supply and demand", "volcanoes",
    "the Roman Empire", "machine learning", "sleep", "the heart", "electric cars", "bread",
    "chess openings", "jazz", "the printing press", "plate tectonics", "public speaking",
    "the Silk Road", "probability", "gardening", "the Moon", "coral reefs", "democracy",
    "a balanced diet", "the Python language", "sorting algorithms", "Shakespeare",
    "renewable energy", "the Industrial Revolution", "databases", "Newton's laws",
    "the immune system", "budgeting", "a job interview", "Japan", "the Amazon rainforest",
    "meditation", "the Internet", "migration", "impressionist painting", "whales",
    "the Olympic Games", "coffee", "architecture", "stress", "earthquakes",
)  # fmt: skip
REQUESTS = (
    "Explain {} to a beginner.",
    "What are the main advantages and disadvantages of {}?",
    "Write a short story about {}.",
    "List five important facts about {}.",
    "Write an email to a colleague about {}.",
    "Why does {} matter? Answer in one paragraph.",
    "Give me practical advice about {}.",
    "Write a dialogue between a teacher and a student about {}.",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One chat request. domain: the name its figures are reported under."""

    domain: str
    text: str


def data_dir() -> Path:
    """The folder of data sets that FATHOM_DATA names.

    Raises:
        TrainingError: when it is unset or no folder; the message says what to put there.
    """
    name = os.environ.get("FATHOM_DATA", "")
    if not name or not Path(name).is_dir():
        raise TrainingError(f"FATHOM_DATA is {name or 'unset'}: no data folder. {DATA_HELP}")
    return Path(name)


def read_rows(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file (gzip or xz) in the data folder, at most ``limit`` of them.

    Raises:
        TrainingError: when the file is missing; the message says where to get it.
    """
    path = data_dir() / name
    if not path.is_file():
        raise TrainingError(f"{path} is missing. {DATA_HELP}")
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt") as stream:
        return [json.loads(line) for line in itertools.islice(stream, limit)]


def train_prompts(seed: int) -> dict[str, list[Prompt]]:
    """Prompts of every training domain, shuffled; no test split and no Spec-Bench among them."""
    rng = random.Random(seed)
    math = [row["question"] for row in read_rows("gsm8k/train.jsonl.gz")]
    # The first sentences suffice: prompts cost time here, but give no rows.
    summary = [
        "Summarize in a few sentences: " + " ".join(row["source"][:5])[:900]
        for row in read_rows("scitldr/train.jsonl.gz")
    ]
    pairs = read_rows("multi30k/train.jsonl.gz", 4000)
    translation = ["Translate German to English: " + row["de"] for row in pairs]
    general = [request.format(topic) for topic in TOPICS for request in REQUESTS]
    domains = {"math": math, "summary": summary, "translation": translation, "general": general}
    for texts in domains.values():
        rng.shuffle(texts)
    return {name: [Prompt(name, text) for text in texts] for name, texts in domains.items()}


def heldout_prompts(math: int = 50, mixed: int = 40) -> list[Prompt]:
    """The first GSM8K test questions, and first turns spread evenly over Spec-Bench."""
    prompts = [Prompt("gsm8k", r["question"]) for r in read_rows("gsm8k/test_a.jsonl.gz", math)]
    rows = read_rows("spec_bench/questions_a.jsonl.gz")
    step = max(1, len(rows) // max(mixed, 1))
    return prompts + [Prompt("spec_bench", row["turns"][0]) for row in rows[::step][:mixed]]


def passages(name: str, count: int, characters: int, seed: int) -> list[str]:
    """``count`` passages of about ``characters`` characters at random places of the books."""
    rng = random.Random(seed)
    # The archive has to be unpacked in order: the first books are enough for a quick head.
    books = [row["text"] for row in read_rows(name, 60)]
    books = [book for book in books if len(book) > 4 * characters]
    if not books:
        raise TrainingError(f"{name} has no book of more than {4 * characters} characters.")
    found = []
    for index in range(count):
        book = books[index % len(books)]
        start = rng.randrange(len(book) - 2 * characters)
        found.append(book[book.find(" ", start) + 1 :][:characters])
    return found


def rank_tokens(tokenizer: Any, answers: Tensor, vocab_size: int) -> Tensor:
    """Every token id, most frequent first, [vocab_size] int64.

    Counted over the model's own answers (weighted, for they are what a head must say) and over
    training texts. Ties, the many tokens never seen among them, go by id: a byte-pair vocabulary
    is numbered in order of merging, that is roughly by frequency.
    """
    texts = [row["question"] + " " + row["answer"] for row in read_rows("gsm8k/train.jsonl.gz")]
    texts += [" ".join(row["source"]) for row in read_rows("scitldr/train.jsonl.gz")]
    texts += [row["en"] for row in read_rows("multi30k/train.jsonl.gz")]
    texts += passages("classics/classics_train.jsonl.xz", 1000, 1500, 3)
    counts = 10.0 * torch.bincount(answers, minlength=vocab_size).double()
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab_size)
    return torch.argsort(counts, descending=True, stable=True)
