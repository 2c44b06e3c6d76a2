"""What an evaluation has measured so far, on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fathom.evaluation.errors import EvaluationError


class Partial:
    """Measured values by key, kept as JSON lines as soon as they are there.

    Args:
        path: the file; None keeps them in memory only. A file that lies there is read.
        job: what the values depend on; a file of another job is refused.

    Raises:
        EvaluationError: for a file of another job, or one that cannot be written.
    """

    def __init__(self, path: Path | None, job: Mapping[str, Any]) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        if path is None:
            return
        header = json.loads(json.dumps({"job": job}))
        if path.exists():
            self._load(path, header)
        lines = [header, *({"key": key, "value": value} for key, value in self._values.items())]
        try:
            # Written anew: a line that was cut by the interruption is dropped.
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(temporary, path)
        except OSError as error:
            raise EvaluationError(f"{path}: cannot write: {error.strerror}.") from error

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any:
        """The value of a key; None if it is not there."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value; it is on disk when this returns."""
        self._values[key] = value
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")

    def remove(self) -> None:
        """Remove the file: its values are elsewhere now."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _load(self, path: Path, header: dict[str, Any]) -> None:
        lines = [_loads(line) for line in path.read_text().splitlines()]
        if not lines or lines[0] != header:
            raise EvaluationError(
                f"{path} is of an evaluation with other data or options: give the same ones, "
                "or remove the file to start afresh."
            )
        for line in lines[1:]:
            if isinstance(line, dict) and "key" in line:
                self._values[line["key"]] = line["value"]


def _loads(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
