"""Data sets in the folder that ``FATHOM_DATA`` names."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
from pathlib import Path
from typing import Any

DATA_HELP = (
    "Set FATHOM_DATA to a folder with gsm8k/{train,test_a}.jsonl.gz (question, answer; "
    "huggingface.co/datasets/openai/gsm8k), hotpotqa/dev_questions.jsonl.gz (question; "
    "hotpotqa.github.io), scitldr/train.jsonl.gz (source, target; "
    "huggingface.co/datasets/allenai/scitldr), multi30k/train.jsonl.gz (de, en; "
    "huggingface.co/datasets/bentrevett/multi30k), spec_bench/questions_a.jsonl.gz (category, "
    "turns; github.com/hemingkx/Spec-Bench) and classics/classics_{train,val}.jsonl.xz (title, "
    "author, text: public-domain books, e.g. from gutenberg.org)."
)


def data_dir() -> Path:
    """The folder of data sets that FATHOM_DATA names.

    Raises:
        SystemExit: when it is unset or no folder; the message says what to put there.
    """
    name = os.environ.get("FATHOM_DATA", "")
    if not name or not Path(name).is_dir():
        raise SystemExit(f"FATHOM_DATA is {name or 'unset'}: no data folder. {DATA_HELP}")
    return Path(name)


def read_rows(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file (gzip or xz) in the data folder, at most ``limit`` of them.

    Raises:
        SystemExit: when the file is missing; the message says where to get it.
    """
    path = data_dir() / name
    if not path.is_file():
        raise SystemExit(f"{path} is missing. {DATA_HELP}")
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt") as stream:
        return [json.loads(line) for line in itertools.islice(stream, limit)]
