"""Files of the data folder, and files of the same form that a user puts in their place."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any

from fathom.evaluation.errors import EvaluationError

Row = tuple[str, dict[str, Any]]
"""``file:line``, for error messages, and the JSON object there."""

SOURCES = {
    "gsm8k": "question, answer; huggingface.co/datasets/openai/gsm8k",
    "dialogsum": "dialogue, summary; huggingface.co/datasets/knkarthick/dialogsum",
    "scitldr": "source, target; huggingface.co/datasets/allenai/scitldr",
    "multi30k": "de, en; huggingface.co/datasets/bentrevett/multi30k",
    "choice": "query, choices, gold; from the sets of those names on huggingface.co/datasets",
    "wikitext2": "plain text; huggingface.co/datasets/Salesforce/wikitext",
    "spec_bench": "category, turns; github.com/hemingkx/Spec-Bench",
}


def data_file(task: str, name: str) -> Path:
    """Where a task's own file lies: ``name`` in the folder that FATHOM_DATA names.

    Raises:
        EvaluationError: when it is not there; the message says where to get it.
    """
    folder = name.split("/")[0]
    remedy = (
        f"set FATHOM_DATA to a folder with {name} ({SOURCES[folder]}), "
        f"or give a file of that form with --data {task}=FILE."
    )
    root = os.environ.get("FATHOM_DATA", "")
    if not root or not Path(root).is_dir():
        raise EvaluationError(f"{task}: FATHOM_DATA is {root or 'unset'}, no data folder: {remedy}")
    path = Path(root) / name
    if not path.is_file():
        raise EvaluationError(f"{task}: {path} is missing: {remedy}")
    return path


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, gzip by its name.

    Raises:
        EvaluationError: for a file that cannot be read or holds nothing.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: it is no UTF-8 text.") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EvaluationError(f"{path}: cannot read it: {reason}.") from error
    if not text.strip():
        raise EvaluationError(f"{path}: the file is empty.")
    return text


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The objects of a JSON-lines file, at most ``limit`` of them. Empty lines are skipped.

    Raises:
        EvaluationError: as ``read_text``, or naming the first line that is no JSON object.
    """
    # Not splitlines(): JSON strings may hold other line separators as they are.
    lines = enumerate(read_text(path).split("\n"), 1)
    filled = ((number, line) for number, line in lines if line.strip())
    rows: list[Row] = []
    for number, line in itertools.islice(filled, limit):
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(
                f"{where}: no valid JSON ({error.msg}); write one object a line."
            ) from error
        if not isinstance(value, dict):
            raise EvaluationError(
                f"{where}: must be an object, got {type(value).__name__}; write one object a line."
            )
        rows.append((where, value))
    return rows
