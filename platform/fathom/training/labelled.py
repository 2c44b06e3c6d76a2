"""Labelled rows for classifiers: JSON lines of texts, or Parquet files of images."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.training.errors import TrainingError

FORMS = "JSON lines {text, label} (.jsonl, .jsonl.gz), or Parquet with columns jpeg and label"


@dataclass(frozen=True, slots=True)
class Labelled:
    """Inputs with their labels.

    Attributes:
        inputs: texts, or the contents of image files.
        labels: of each, as written; integers become decimal strings.
        names: label -> name to show for it, where the file tells.
    """

    inputs: Sequence[str] | Sequence[bytes]
    labels: Sequence[str]
    names: dict[str, str]

    @property
    def is_text(self) -> bool:
        """Whether the inputs are texts."""
        return isinstance(self.inputs[0], str)

    def take(self, rows: Sequence[int]) -> Labelled:
        """These rows alone."""
        inputs: Any = [self.inputs[row] for row in rows]
        return Labelled(inputs, [self.labels[row] for row in rows], self.names)


def read_labelled(file: Path) -> Labelled:
    """Read a file of labelled rows.

    Raises:
        TrainingError: if it is missing, empty, damaged, or of another form.
    """
    try:
        found = _read_parquet(file) if file.suffix == ".parquet" else _read_lines(file)
    except OSError as error:
        raise TrainingError(f"{file}: cannot read: {error}. Give {FORMS}.") from error
    if not found.inputs:
        raise TrainingError(f"{file}: holds no rows; give {FORMS}.")
    return found


def _read_lines(file: Path) -> Labelled:
    texts, labels = [], []
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text, label = row["text"], row["label"]
            except (ValueError, KeyError, TypeError) as error:
                raise TrainingError(f"{file}:{number}: {error!r}; give {FORMS}.") from error
            if not isinstance(text, str) or not isinstance(label, str | int):
                raise TrainingError(
                    f"{file}:{number}: text must be a string and label a string or an integer."
                )
            texts.append(text)
            labels.append(str(label))
    return Labelled(texts, labels, {})


def _read_parquet(file: Path) -> Labelled:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
        images, labels = table["jpeg"].to_pylist(), table["label"].to_pylist()
        names = table["name"].to_pylist() if "name" in table.column_names else labels
    except (pa.ArrowException, KeyError) as error:
        raise TrainingError(f"{file}: {error}; give {FORMS}.") from error
    written = [str(label) for label in labels]
    return Labelled(images, written, dict(zip(written, map(str, names), strict=True)))


def classes_of(rows: Labelled) -> list[str]:
    """The distinct labels, integers in their order, else by the alphabet.

    Raises:
        TrainingError: if there is but one.
    """
    found = sorted(set(rows.labels))
    if all(label.lstrip("-").isdigit() for label in found):
        found.sort(key=int)
    if len(found) < 2:
        raise TrainingError(f"labels must be of at least two classes, got {found} alone.")
    return found
