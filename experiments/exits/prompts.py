"""The prompts that the adapters are trained on, from the data sets that ``FATHOM_DATA`` names.

    python -m experiments.exits.prompts --out data

writes ``default.jsonl`` (prompts for ``fathom train exits --self-distill``), ``heldout.jsonl`` (the
same, of test splits), and for the task adapters ``multi30k.jsonl`` and ``scitldr.jsonl``, each with
its ``-heldout.jsonl`` (chats with their references).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from experiments.datasets import read_rows
from fathom.evaluation.tasks import TASKS, GenerationTask

# General questions of our own making: the sets cover arithmetic, summaries, translation, facts.
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


# Prompts a domain in default.jsonl. Arithmetic is the domain that the adapter is judged on.
MIX = {
    "gsm8k": 4200,
    "scitldr": 900,
    "multi30k": 900,
    "hotpotqa": 1000,
    "general": 400,
    "classics": 600,
}


def passages(name: str, count: int, characters: int, seed: int) -> list[str]:
    """``count`` passages of about ``characters`` characters at random places of the books."""
    rng = random.Random(seed)
    # The archive has to be unpacked in order: the first books are enough.
    books = [row["text"] for row in read_rows(name, 60)]
    books = [book for book in books if len(book) > 4 * characters]
    found = []
    for index in range(count):
        book = books[index % len(books)]
        start = rng.randrange(len(book) - 2 * characters)
        found.append(book[book.find(" ", start) + 1 :][:characters])
    return found


def training_prompts(seed: int) -> list[tuple[str, str]]:
    """(domain, prompt), shuffled; no test split and no Spec-Bench among them."""
    rng = random.Random(seed)
    tasks = ("Continue this story: ", "Rewrite this in modern English: ")
    books = passages("classics/classics_train.jsonl.xz", MIX["classics"], 500, 5)
    domains = {
        "gsm8k": [row["question"] for row in read_rows("gsm8k/train.jsonl.gz")],
        "scitldr": [
            "Summarize in a few sentences: " + " ".join(row["source"][:5])[:900]
            for row in read_rows("scitldr/train.jsonl.gz")
        ],
        "multi30k": [
            "Translate German to English: " + row["de"]
            for row in read_rows("multi30k/train.jsonl.gz", 6000)
        ],
        "hotpotqa": [row["question"] for row in read_rows("hotpotqa/dev_questions.jsonl.gz")],
        "general": [request.format(topic) for topic in TOPICS for request in REQUESTS],
        "classics": [tasks[i % 2] + text for i, text in enumerate(books)],
    }
    found = []
    for name, texts in domains.items():
        rng.shuffle(texts)
        found += [(name, text) for text in texts[: MIX[name]]]
    rng.shuffle(found)
    return found


def heldout_prompts(count: int = 60) -> list[tuple[str, str]]:
    """The first GSM8K test questions, and first turns spread evenly over Spec-Bench."""
    math = [("gsm8k", row["question"]) for row in read_rows("gsm8k/test_a.jsonl.gz", count)]
    rows = read_rows("spec_bench/questions_a.jsonl.gz")
    spread = rows[:: max(1, len(rows) // count)][:count]
    return math + [("spec_bench", row["turns"][0]) for row in spread]


def references(task: str, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """A task's rows as chats: the prompt that ``fathom eval`` uses, and the first reference."""
    found = TASKS[task]
    assert isinstance(found, GenerationTask)
    chats = []
    for number, row in enumerate(read_rows(f"{task}/{split}.jsonl.gz", limit), 1):
        item = found.parse(f"{task}/{split}:{number}", row)
        chats.append(chat(task, found.template.format(text=item.text), item.references[0]))
    return chats


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines and say so."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)}")


def chat(domain: str, text: str, answer: str | None = None) -> dict[str, Any]:
    """A prompt, perhaps with its answer, as a line of a prompt file."""
    messages = [{"role": "user", "content": text}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "domain": domain}


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "default.jsonl", [chat(*each) for each in training_prompts(args.seed)])
    write(args.out / "heldout.jsonl", [chat(*each) for each in heldout_prompts()])
    write(args.out / "multi30k.jsonl", references("multi30k", "train"))
    write(args.out / "multi30k-heldout.jsonl", references("multi30k", "valid", 200))
    write(args.out / "scitldr.jsonl", references("scitldr", "train"))
    write(args.out / "scitldr-heldout.jsonl", references("scitldr", "dev", 60))


if __name__ == "__main__":
    main()
